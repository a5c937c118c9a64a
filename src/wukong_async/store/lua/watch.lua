-- A watcher's look at a job: revive the executors whose lease is over, and keep the job from
-- expiring. Any number of watchers may call it; test and set in one step.
--
-- An incarnation that never began (its event got lost, or waits for a slot) does not count as an
-- attempt, but has a bound of its own, and waits twice as long each time.
--
-- Who gives a token owns the job, or takes it over if its owner's lease is over. What is missing
-- although it must be there while a job runs was lost by the server: the job fails.
--
-- ARGV  1 most executors to revive  2 the watcher's token, or ''
-- reply {state, passed, live, extended, {revived, ...}, unheard, owned, pause} | {} for an unknown job
--       extended: 0, or the time to live of what the job has elsewhere, which is to be extended
--       unheard: how many of the revived have not begun since they were invoked last
--       owned: 1 if the watcher owns the job now
--       pause: when to look again
local job = call('HMGET', JOB, 'state', 'attempts', 'grace', 'unstarted', 'passed', 'ttl', 'deadline',
  'lease', 'owner')
if not job[1] then
  call('ZREM', JOBS, ID)
  return {}
end
local t = now()
local owned = 0
if job[9] and ARGV[2] ~= '' then
  local lease = call('ZSCORE', JOBS, ID)
  if job[9] == ARGV[2] or not lease or tonumber(lease) <= t then
    own(ARGV[2], t, job[8], job[6])
    owned = 1
  end
end

local function lose(what)
  finish_job('failed', cmsgpack.pack({ 'data', what }))
  job[1] = 'failed'
end

local revived, unheard = {}, 0
if job[1] == 'running' and timed_out(t) then job[1] = 'failed' end
if job[1] == 'running' and call('EXISTS', OPEN) == 0 then lose('its mark on a server') end
if job[1] == 'running' and call('ZCARD', LIVE) == 0 then lose('its list of executors') end
if job[1] == 'running' then
  for _, x in ipairs(call('ZRANGEBYSCORE', LIVE, '-inf', t, 'LIMIT', 0, ARGV[1])) do
    local r = load_record(x)
    if not r then
      lose('its executors')
      revived, unheard = {}, 0
      break
    end
    if not r.held then
      r.unstarted = r.unstarted + 1
      unheard = unheard + 1
    end
    if r.tries >= tonumber(job[2]) or r.unstarted > tonumber(job[4]) then
      give_up(r.tries >= tonumber(job[2]) and 'lost' or 'unstarted', x, r)
      job[1] = 'failed'
      revived, unheard = {}, 0
      break
    end
    r.held = false
    call('HSET', REC, x, pack_record(r))
    call('ZADD', LIVE, 'XX', t + job[3] * math.min(2 ^ r.unstarted, LONGEST), x)
    revived[#revived + 1] = x
  end
end
local extended = 0
if job[9] and tonumber(job[7]) - t < job[6] * 2 / 3 then
  extended = tonumber(job[6])
  call('HSET', JOB, 'deadline', t + job[6])
  expire(t + job[6], JOB, LIVE, REC, CNT, REFS, VAL, RES, OPEN, ARR, TAKEN, DEAD)
  keep_registry(job[6])
end
return { job[1], tonumber(job[5]), call('ZCARD', LIVE), extended, revived, unheard, owned,
  math.min(job[8], job[3]) / 2 }
