-- One step of an executor. Atomic: it has all of its effects or none, exactly once.
--
-- ARGV  1 executor  2 gen  3 nonce  4 seq
--       5 msgpack: {passed, stay, publish {{object, reads, place, value}, ...},
--                   results {{task, value}, ...}, arrivals {{consumer, in-degree, brought}, ...},
--                   reads {{object, reads}, ...}, error, probes {{consumer, in-degree,
--                   {{edge, producer}, ...}}, ...}, offers {{task, ...}, ...}, release, told,
--                   memory}
--         stay: {{task, {input that is in no store, ...}}, ...}; false in a soft commit
--         brought: a number of inputs, or the edges {edge, ...}
--         told: a digest of what the record comes from, and of what it was told since
--         error is '' unless a task failed
--         place: of what is not in the metadata; begins with its bytes
--         memory: MB that the executor has had at the most
-- reply msgpack: {status, claims, deletes {{object, place}, ...}, gone, accepted {bool, ...},
--                 already {edge, ...}, free}
local x, gen, nonce, seq = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local NOTHING = {}

local function only(status)
  return cmsgpack.pack({ status, NOTHING, NOTHING, false, NOTHING, NOTHING, 0 })
end

-- With what an executor has to know of an answer; protocol.py has the same.
local function told_after(told, claims, accepted, already)
  if #claims + #accepted + #already == 0 then return told end
  local offers = {}
  for i, yes in ipairs(accepted) do offers[i] = yes and '1' or '0' end
  return digest(told, table.concat(claims, ','), table.concat(offers), table.concat(already, ','))
end

local r = fenced_record(x, gen, nonce)
if not r then return only('FENCED') end
local job = call('HMGET', JOB, 'state', 'lease', 'want', 'tasks', 'deadline', 'slots', 'grace',
  'peak', 'memory')
if job[1] ~= 'running' then
  drop_record(x)
  return only('STOP')
end
if seq == r.seq then return call('HGET', REC, x .. '/r') end
if seq < r.seq then return only('STALE') end
if seq > r.seq + 1 then return only('REJECTED') end

local passed, stay, publish, results, arrivals, reads, err, probes, offers, release, told,
  memory = unpack(cmsgpack.unpack(ARGV[5]), 1, 12)
-- A server that failed over has forgotten that commit, and took a late copy of it differently; or
-- it knows this incarnation from a late copy of its begin only, and the record is another one.
if told ~= r.told then return only('REJECTED') end
local hard = stay ~= false
local frontier, marks = {}, {}
if hard then
  for _, s in ipairs(stay) do
    frontier[#frontier + 1] = s[1]
    if #s[2] > 0 then marks[#marks + 1] = s end
  end
else
  frontier = cmsgpack.unpack(call('HGET', REC, x .. '/f'))
  local packed = call('HGET', REC, x .. '/m')
  if packed then marks = cmsgpack.unpack(packed) end
end

if err ~= '' then
  finish_job('failed', err)
  call('HINCRBY', JOB, 'commits', 1)
  drop_record(x)
  return only('STOP')
end
call('HINCRBY', JOB, 'commits', 1)

-- Publish: from here on others may read the object, and its reads are counted. What a dead
-- incarnation has published before stays as it is.
local refs, values, deletes, visible, bytes = {}, {}, {}, {}, 0
local function size_of(place) return tonumber(string.match(place, '^%d+')) end
for _, p in ipairs(publish) do
  local object, count, place, value = p[1], p[2], p[3], p[4]
  visible[object] = true
  if r.check and (call('GETBIT', DEAD, object) == 1 or call('HEXISTS', REFS, object) == 1) then
    if place ~= '' then deletes[#deletes + 1] = { object, place } end
  else
    refs[#refs + 1] = object
    refs[#refs + 1] = (hard and '' or '~') .. (place ~= '' and (count .. ':' .. place) or count)
    if place ~= '' then bytes = bytes + size_of(place) end
    values[#values + 1] = object
    values[#values + 1] = value
  end
end
in_chunks('HSET', REFS, refs)
in_chunks('HSET', VAL, values)

-- Arrive: who brings the last input claims the fan-in.
local claims, already = {}, {}
local function claim(consumer)
  call('HDEL', CNT, consumer)
  call('SETBIT', TAKEN, consumer, 1)
  claims[#claims + 1] = consumer
  frontier[#frontier + 1] = consumer
end
for _, a in ipairs(arrivals) do
  local consumer, degree, brought = a[1], a[2], a[3]
  if type(brought) == 'table' then
    local new = 0
    if call('GETBIT', TAKEN, consumer) == 0 then
      for _, edge in ipairs(brought) do new = new + 1 - call('SETBIT', ARR, edge, 1) end
    end
    brought = new
  end
  if brought > 0 and call('HINCRBY', CNT, consumer, brought) == degree then claim(consumer) end
end

-- Probe: claim the fan-in if nothing else is missing; otherwise nothing has happened.
for _, p in ipairs(probes) do
  local consumer, degree, pending = p[1], p[2], p[3]
  local taken = call('GETBIT', TAKEN, consumer) == 1
  local edges, producers = {}, {}
  for _, e in ipairs(pending) do
    if taken or call('GETBIT', ARR, e[1]) == 1 then
      already[#already + 1] = e[1]
    else
      edges[#edges + 1] = e[1]
      producers[#producers + 1] = e[2]
    end
  end
  if #edges > 0 and (tonumber(call('HGET', CNT, consumer)) or 0) + #edges == degree then
    for _, edge in ipairs(edges) do call('SETBIT', ARR, edge, 1) end
    claim(consumer)
    marks[#marks + 1] = { consumer, producers }
  end
end

-- Offer: a record for each group of tasks, as long as there are free slots.
local slots, accepted, handed = tonumber(job[6]), {}, {}
for k, tasks in ipairs(offers) do
  accepted[k] = call('ZCARD', LIVE) < slots
  if accepted[k] then
    local place = seq .. '.' .. (k - 1)
    new_record(x .. '.' .. place, cmsgpack.pack(tasks), r.check, now() + job[7],
      digest(r.told, place))
    for _, task in ipairs(tasks) do
      call('SETBIT', TAKEN, task, 1)
      handed[task] = true
    end
  end
end

-- Pass: count down what the finished tasks have read; the last reader frees the object.
local freed, kept, freed_places = {}, {}, {}
for i = 1, #reads, CHUNK do
  local objects = {}
  for j = i, math.min(i + CHUNK - 1, #reads) do objects[#objects + 1] = reads[j][1] end
  for j, ref in ipairs(call('HMGET', REFS, unpack(objects))) do
    if ref then
      local again, count, place = string.match(ref, '^(~?)(%d+):?(.*)$')
      count = tonumber(count) - reads[i + j - 1][2]
      if count > 0 then
        kept[#kept + 1] = objects[j]
        kept[#kept + 1] = again .. (place ~= '' and (count .. ':' .. place) or count)
      else
        freed[#freed + 1] = objects[j]
        if place ~= '' then
          deletes[#deletes + 1] = { objects[j], place }
          freed_places[#freed_places + 1] = place
        end
        if again ~= '' then call('SETBIT', DEAD, objects[j], 1) end
      end
    end
  end
end
in_chunks('HSET', REFS, kept)
in_chunks('HDEL', REFS, freed)
in_chunks('HDEL', VAL, freed)
local total = call('HINCRBY', JOB, 'passed', passed)

-- What the job keeps outside of the metadata, and the most that it has kept.
local freed_bytes = 0
for _, d in ipairs(freed_places) do freed_bytes = freed_bytes + size_of(d) end
if bytes > 0 or freed_bytes > 0 then
  local kept_bytes = call('HINCRBY', JOB, 'bytes', bytes)
  if kept_bytes > (tonumber(job[8]) or 0) then call('HSET', JOB, 'peak', kept_bytes) end
  call('HINCRBY', JOB, 'bytes', 0 - freed_bytes)
end
if memory > (tonumber(job[9]) or 0) then call('HSET', JOB, 'memory', memory) end

-- What a dead incarnation has put for this result may be what is published.
for _, result in ipairs(results) do
  call('HSETNX', RES, result[1], r.check and call('HGET', VAL, result[1]) or result[2])
end

-- The new frontier: what was claimed, without what was handed over. Nothing in it: the executor is
-- done and its slot free.
local rest, left = {}, {}
for _, task in ipairs(frontier) do
  if not handed[task] then rest[#rest + 1] = task end
end
for _, mark in ipairs(marks) do
  local inputs = {}
  for _, input in ipairs(mark[2]) do
    if not visible[input] then inputs[#inputs + 1] = input end
  end
  if #inputs > 0 then left[#left + 1] = { mark[1], inputs } end
end
local gone = #rest == 0
if gone then drop_record(x) end
local free = slots - call('ZCARD', LIVE)
local answer = cmsgpack.pack({ 'OK', claims, deletes, gone, accepted, already, free })
if not gone then
  r.seq, r.told = seq, told_after(r.told, claims, accepted, already)
  if not hard then
    r.soft = true
  else
    r.soft = r.check
    if passed > 0 then r.tries = 1 end
  end
  if hard or #claims > 0 or next(handed) then
    call('HSET', REC, x .. '/f', cmsgpack.pack(rest))
  end
  if #left > 0 then
    call('HSET', REC, x .. '/m', cmsgpack.pack(left))
  elseif #marks > 0 or hard then
    call('HDEL', REC, x .. '/m')
  end
  local over
  if release then
    -- For another incarnation, and no attempt: nobody holds it from here on.
    r.held, r.gen, r.tries = false, r.gen + 1, 0
    over = now() + job[7]
  else
    over = lease_end(r, job[2])
  end
  call('HSET', REC, x, pack_record(r), x .. '/r', answer)
  call('ZADD', LIVE, 'XX', over, x)
end

if #results > 0 and call('HLEN', RES) == tonumber(job[3]) then
  -- Who has told its outputs may still have to pass them; nobody needs to wait for that.
  if total == tonumber(job[4]) or call('ZCARD', LIVE) > 0 then
    finish_job('done', '')
  else
    finish_job('failed', cmsgpack.pack({ 'protocol', total .. ' of ' .. job[4] .. ' tasks passed' }))
  end
elseif gone and call('ZCARD', LIVE) == 0 then
  -- A cheap proof against hanging: nobody is left who could finish the job.
  finish_job('failed', cmsgpack.pack({ 'protocol', 'no executor is left and results are missing' }))
end
if #publish > 0 then expire(job[5], REFS, VAL) end
if #arrivals > 0 then expire(job[5], CNT, ARR) end
if #probes > 0 then expire(job[5], ARR) end
if #freed > 0 then expire(job[5], DEAD) end
if #results > 0 then expire(job[5], RES) end
return answer
