-- Delete everything of a job on a data shard. Atomic against `confirm`: what is written later finds
-- no `open` and takes itself back.
--
-- KEYS  1 open  2 index  3 job, which only the metadata shard has
-- ARGV  1 '1' to do it even while the job runs
-- reply OK | RUNNING: the job has not ended, nothing was done
if ARGV[1] ~= '1' and redis.call('HGET', KEYS[3], 'state') == 'running' then return 'RUNNING' end
redis.call('DEL', KEYS[1])
local objects = redis.call('SMEMBERS', KEYS[2])
for i = 1, #objects, 2000 do
  redis.call('UNLINK', unpack(objects, i, math.min(i + 1999, #objects)))
end
redis.call('DEL', KEYS[2])
return 'OK'
