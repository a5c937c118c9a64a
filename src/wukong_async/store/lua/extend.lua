-- Move the expiry of everything of a job on a data shard.
--
-- KEYS  1 open  2 index
-- ARGV  1 time to live in ms
-- reply how many objects there are
local objects = redis.call('SMEMBERS', KEYS[2])
for _, object in ipairs(objects) do redis.call('PEXPIRE', object, ARGV[1]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return #objects
