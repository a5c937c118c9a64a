-- Jobs whose owner's lease is over.
--
-- KEYS  1 jobs, and nothing else
-- ARGV  1 how many to skip  2 most of them
-- reply {job, ...}
return call('ZRANGEBYSCORE', KEYS[1], '-inf', now(), 'LIMIT', ARGV[1], ARGV[2])
