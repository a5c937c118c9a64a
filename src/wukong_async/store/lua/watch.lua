-- A watcher's look at a job: revive the executors whose lease is over, and keep the job from
-- expiring. Any number of watchers may call it; test and set in one step.
--
-- An incarnation that never began (its event got lost, or waits for a slot) does not count as an
-- attempt, but has a bound of its own, and waits twice as long each time.
--
-- ARGV  1 most executors to revive
-- reply {state, passed, live, extended, {revived, ...}, unheard} | {} for an unknown job
--       unheard: how many of the revived have not begun since they were invoked last
local job = call('HMGET', JOB, 'state', 'attempts', 'grace', 'unstarted', 'passed', 'ttl', 'deadline')
if not job[1] then return {} end
local t = now()
local revived, unheard = {}, 0
if job[1] == 'running' then
  for _, x in ipairs(call('ZRANGEBYSCORE', LIVE, '-inf', t, 'LIMIT', 0, ARGV[1])) do
    local r = load_record(x)
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
if tonumber(job[7]) - t < job[6] * 2 / 3 then
  extended = 1
  call('HSET', JOB, 'deadline', t + job[6])
  expire(t + job[6], JOB, LIVE, REC, CNT, REFS, VAL, RES, OPEN, ARR, TAKEN, DEAD)
end
return { job[1], tonumber(job[5]), call('ZCARD', LIVE), extended, revived, unheard }
