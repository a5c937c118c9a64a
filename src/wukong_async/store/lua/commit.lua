-- One step of an executor. Atomic: it has all of its effects or none, exactly once.
--
-- ARGV  1 executor  2 gen  3 seq
--       4 msgpack: {passed, publish {{object, reads, place, value}, ...}, results {{task, value}, ...},
--                   arrivals {{consumer, in-degree, inputs}, ...}, reads {{object, reads}, ...}, error}
--         error is '' unless a task failed
-- reply msgpack: {status, claims, deletes {{object, place}, ...}, gone}
local x, gen, seq = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local NOTHING = {}

local function reply(status, claims, deletes, gone)
  return cmsgpack.pack({ status, claims or NOTHING, deletes or NOTHING, gone or false })
end

local r = load_record(x)
if not r or r.gen ~= gen then return reply('FENCED') end
local job = call('HMGET', JOB, 'state', 'lease', 'want', 'tasks', 'deadline')
if job[1] ~= 'running' then
  drop_record(x)
  return reply('STOP')
end
if seq == r.seq then return call('HGET', REC, x .. '/r') end
if seq < r.seq then return reply('STALE') end
if seq > r.seq + 1 then return reply('REJECTED') end

local passed, publish, results, arrivals, reads, err = unpack(cmsgpack.unpack(ARGV[4]), 1, 6)
call('HINCRBY', JOB, 'commits', 1)
if err ~= '' then
  finish_job('failed', err)
  drop_record(x)
  return reply('STOP')
end

-- Publish: from here on others may read the object, and its reads are counted.
local refs, values = {}, {}
for _, p in ipairs(publish) do
  local object, count, place, value = p[1], p[2], p[3], p[4]
  refs[#refs + 1] = object
  refs[#refs + 1] = place ~= '' and (count .. ':' .. place) or count
  values[#values + 1] = object
  values[#values + 1] = value
end
in_chunks('HSET', REFS, refs)
in_chunks('HSET', VAL, values)

-- Arrive: who brings the last input claims the fan-in.
local claims = {}
for _, a in ipairs(arrivals) do
  local consumer, degree, count = a[1], a[2], a[3]
  if call('HINCRBY', CNT, consumer, count) == degree then
    call('HDEL', CNT, consumer)
    claims[#claims + 1] = consumer
  end
end

-- Pass: count down what the finished tasks have read; the last reader frees the object.
local deletes, freed, kept = {}, {}, {}
for i = 1, #reads, CHUNK do
  local objects = {}
  for j = i, math.min(i + CHUNK - 1, #reads) do objects[#objects + 1] = reads[j][1] end
  for j, ref in ipairs(call('HMGET', REFS, unpack(objects))) do
    if ref then
      local count, place = string.match(ref, '^(%d+):?(.*)$')
      count = tonumber(count) - reads[i + j - 1][2]
      if count > 0 then
        kept[#kept + 1] = objects[j]
        kept[#kept + 1] = place ~= '' and (count .. ':' .. place) or count
      else
        freed[#freed + 1] = objects[j]
        if place ~= '' then deletes[#deletes + 1] = { objects[j], place } end
      end
    end
  end
end
in_chunks('HSET', REFS, kept)
in_chunks('HDEL', REFS, freed)
in_chunks('HDEL', VAL, freed)
local total = call('HINCRBY', JOB, 'passed', passed)

for _, result in ipairs(results) do call('HSETNX', RES, result[1], result[2]) end

-- The new frontier is what was claimed. Nothing claimed: the executor is done and its slot free.
local gone = #claims == 0
local answer = reply('OK', claims, deletes, gone)
if gone then
  drop_record(x)
else
  r.seq = seq
  call('HSET', REC, x, pack_record(r), x .. '/f', cmsgpack.pack(claims), x .. '/r', answer)
  call('ZADD', LIVE, 'XX', now() + job[2] * math.min(2 ^ (r.gen - 1), LONGEST), x)
end

if #results > 0 and call('HLEN', RES) == tonumber(job[3]) then
  if total == tonumber(job[4]) then
    finish_job('done', '')
  else
    finish_job('failed', cmsgpack.pack({ 'protocol', total .. ' of ' .. job[4] .. ' tasks passed' }))
  end
elseif gone and call('ZCARD', LIVE) == 0 then
  -- A cheap proof against hanging: nobody is left who could finish the job.
  finish_job('failed', cmsgpack.pack({ 'protocol', 'no executor is left and results are missing' }))
end
if #publish > 0 then expire(job[5], REFS, VAL) end
if #arrivals > 0 then expire(job[5], CNT) end
if #results > 0 then expire(job[5], RES) end
return answer
