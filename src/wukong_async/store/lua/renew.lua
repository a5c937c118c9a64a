-- Extend a lease. Fenced like a commit, or a late renewal would leave a ghost in `live`.
--
-- ARGV  1 executor  2 gen
-- reply OK | FENCED | STOP
local x, gen = ARGV[1], tonumber(ARGV[2])
local r = load_record(x)
if not r or r.gen ~= gen then return 'FENCED' end
local job = call('HMGET', JOB, 'state', 'lease')
local t = now()
if job[1] ~= 'running' or timed_out(t) then return 'STOP' end
call('ZADD', LIVE, 'XX', t + job[2] * math.min(2 ^ (gen - 1), LONGEST), x)
return 'OK'
