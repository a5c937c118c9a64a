-- Let go of a job that has ended and whose client is gone: what others may ask for stays, for a
-- while; nobody owns it any more.
--
-- reply OK | RUNNING: the job has not ended, nothing was done
local job = call('HMGET', JOB, 'state', 'owner', 'result_ttl')
if job[1] == 'running' then return 'RUNNING' end
call('ZREM', JOBS, ID)
if not job[2] then return 'OK' end -- It is gone, or was retired before.
call('HDEL', JOB, 'owner')
call('UNLINK', LIVE, REC, CNT, REFS, VAL, OPEN, ARR, TAKEN, DEAD)
if job[1] ~= 'done' then call('UNLINK', RES) end
expire(now() + job[3], JOB, RES)
return 'OK'
