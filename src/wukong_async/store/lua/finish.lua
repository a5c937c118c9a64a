-- Forget a job. The last step of its clean-up: a finisher that dies before it can be succeeded.
--
-- reply OK | RUNNING: the job has not ended, nothing was done
if call('HGET', JOB, 'state') == 'running' then return 'RUNNING' end
call('ZREM', JOBS, ID)
call('UNLINK', JOB, LIVE, REC, CNT, REFS, VAL, RES, OPEN, ARR, TAKEN, DEAD)
return 'OK'
