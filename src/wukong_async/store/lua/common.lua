-- Shared by every script of a job's metadata; put in front of each when it is loaded.
--
-- KEYS  1 job   hash   state, error, counts and limits of the job
--       2 live  zset   executor -> time its lease is over; its size is the slots in use
--       3 rec   hash   executor -> {gen, nonce, held, seq, unstarted, tries, soft, check,
--                      request, told}; executor/f -> frontier;
--                      executor/m -> marks, {{task, {input, ...}}, ...}, if any;
--                      executor/r -> reply to the last commit;
--                      executor/n -> what an incarnation said last of itself, if anything
--       4 cnt   hash   fan-in -> inputs that have arrived
--       5 refs  hash   object -> "reads to come", or "reads to come:place" on the data shards; with
--                      "~" in front while its producer may make it again
--       6 val   hash   object -> small value, or pointer to the data shards
--       7 res   hash   requested task -> small value or pointer
--       8 open  string while it exists, the job may write; it outlives every object of the job
--       9 arr   bits   edges whose arrival was brought by a commit that passed nothing
--      10 taken bits   tasks that are or were in somebody's frontier
--      11 dead  bits   objects that were freed before their producer passed
--      12 jobs  zset   job -> time its owner's lease is over: all jobs of this server that somebody
--                      has to clean up after
--
-- All times are this server's, in milliseconds. Numbers stay below 2^53. Everything is decoded
-- before the first write, because Lua does not roll back.

local JOB, LIVE, REC, CNT, REFS, VAL, RES, OPEN, ARR, TAKEN, DEAD, JOBS = unpack(KEYS, 1, 12)
local ID = string.match(JOB, '{(.*)}')
local call = redis.call
local CHUNK = 2000 -- values that unpack() can take safely; its own limit is near 8,000
local OWNED = 2 -- an owner's lease is this many times an executor's
local LONGEST = 8 -- a lease or a grace grows at most this many times over

local function now()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

--  gen       goes up with each incarnation
--  nonce     of the last incarnation; with the generation it is the fence
--  held      that one was not given up for dead, and has not given the record back
--  seq       of the last commit
--  unstarted how often nobody came who was invoked
--  tries     how often the work of this frontier was begun
--  told      a digest of where it comes from, and of what it was told since
--  soft      there are effects of tasks that have not passed
--  check     others may meet such effects of a dead incarnation
--  request   of the last incarnation, for its log
local function load_record(x)
  local packed = call('HGET', REC, x)
  if not packed then return nil end
  local r = cmsgpack.unpack(packed)
  return { gen = r[1], nonce = r[2], held = r[3], seq = r[4], unstarted = r[5], tries = r[6],
    soft = r[7], check = r[8], request = r[9], told = r[10] }
end

-- The record, if nobody has come after this incarnation. The generation alone would not do: a server
-- that fails over may have forgotten one, and give it to another.
local function fenced_record(x, gen, nonce)
  local r = load_record(x)
  if r and r.gen == gen and r.nonce == nonce then return r end
end

local function pack_record(r)
  return cmsgpack.pack({ r.gen, r.nonce, r.held, r.seq, r.unstarted, r.tries, r.soft, r.check,
    r.request, r.told })
end

local function new_record(x, frontier, check, over, told)
  call('HSET', REC, x, pack_record({ gen = 0, nonce = '', held = false, seq = 0, unstarted = 0,
    tries = 0, soft = false, check = check, request = '', told = told }), x .. '/f', frontier)
  call('ZADD', LIVE, over, x)
end

-- protocol.py has the same.
local function digest(...)
  return redis.sha1hex(table.concat({ ... }, '|'))
end

local function drop_record(x)
  call('HDEL', REC, x, x .. '/f', x .. '/m', x .. '/r', x .. '/n')
  call('ZREM', LIVE, x)
end

-- When the lease of a record is over: longer each time that its work was begun in vain.
local function lease_end(r, lease)
  return now() + lease * math.min(2 ^ math.max(0, r.tries - 1), LONGEST)
end

-- A key that was emptied and written again has lost its expiry: a script sets it on what it may
-- have created. `job`, `live` and `rec` are created once, with the job.
local function expire(deadline, ...)
  for _, key in ipairs({ ... }) do call('PEXPIREAT', key, deadline) end
end

-- The registry is no key of the job: it lives as long as any job of the server may.
local function keep_registry(ttl)
  if call('PTTL', JOBS) < tonumber(ttl) then call('PEXPIRE', JOBS, ttl) end
end

local function own(owner, t, lease, ttl)
  call('HSET', JOB, 'owner', owner)
  call('ZADD', JOBS, t + OWNED * lease, ID)
  keep_registry(ttl)
end

-- The only way out of the running state.
local function finish_job(state, err)
  local job = call('HMGET', JOB, 'channel', 'id')
  -- A full server lets those go on who have written, and this is a write that it takes.
  call('HDEL', JOB, 'nothing')
  call('HSET', JOB, 'state', state, 'error', err)
  for channel in string.gmatch(job[1], '%S+') do call('PUBLISH', channel, job[2]) end
end

-- Whether a running job has taken longer than it may; then it has failed here and now.
local function timed_out(t)
  local job = call('HMGET', JOB, 'limit', 'timeout', 'passed', 'tasks')
  if not job[1] or job[1] == '0' or tonumber(job[1]) > t then return false end
  finish_job('failed', cmsgpack.pack({ 'overtime', tonumber(job[2]), tonumber(job[3]),
    tonumber(job[4]) }))
  return true
end

-- An executor's work was begun, or its invocation sent, too often.
local function give_up(kind, x, r)
  local f, n = unpack(call('HMGET', REC, x .. '/f', x .. '/n'))
  finish_job('failed', cmsgpack.pack({ kind, x, r.tries, f, r.request, n or '' }))
end

local function in_chunks(command, key, args)
  for i = 1, #args, CHUNK do
    call(command, key, unpack(args, i, math.min(i + CHUNK - 1, #args)))
  end
end
