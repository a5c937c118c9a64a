-- Extend a lease. Fenced like a commit, or a late renewal would leave a ghost in `live`.
--
-- ARGV  1 executor  2 gen  3 nonce  4 what it says of itself, or ''
-- reply OK | FENCED | STOP
local x = ARGV[1]
local r = fenced_record(x, tonumber(ARGV[2]), ARGV[3])
if not r then return 'FENCED' end
local job = call('HMGET', JOB, 'state', 'lease')
if job[1] ~= 'running' or timed_out(now()) then return 'STOP' end
call('ZADD', LIVE, 'XX', lease_end(r, job[2]), x)
if ARGV[4] ~= '' then call('HSET', REC, x .. '/n', ARGV[4]) end
return 'OK'
