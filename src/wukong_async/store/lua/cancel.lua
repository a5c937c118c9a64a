-- Cancel a job. Executors notice at their next renewal, commit, put or missing read.
--
-- ARGV  1 msgpack error: {'cancelled', reason} or another way for a client to fail its job
--       2 state: cancelled | failed
-- reply the job's state afterwards | nil for an unknown job
local state = call('HGET', JOB, 'state')
if state == 'running' then
  finish_job(ARGV[2], ARGV[1])
  return ARGV[2]
end
return state
