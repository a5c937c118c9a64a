-- Second half of a put on a data shard, in one transaction with the SETs before it: enter the
-- objects in the index of their job, or take them back if the job is over. Without it, a write of
-- a zombie could land after the clean-up and stay for ever.
--
-- KEYS  1 open  2 index of the job's objects here  3... objects
-- ARGV  1 time to live of the index in ms
-- reply OK | CLOSED
local objects = {}
for i = 3, #KEYS do objects[#objects + 1] = KEYS[i] end
if redis.call('EXISTS', KEYS[1]) == 0 then
  -- What is in the index was there before, and stays for whoever attaches.
  for _, object in ipairs(objects) do
    if redis.call('SISMEMBER', KEYS[2], object) == 0 then redis.call('UNLINK', object) end
  end
  return 'CLOSED'
end
redis.call('SADD', KEYS[2], unpack(objects))
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return 'OK'
