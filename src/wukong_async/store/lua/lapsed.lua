-- Jobs whose owner's lease is over.
--
-- KEYS  1 jobs, and nothing else
-- ARGV  1 most of them
-- reply {job, ...}
return call('ZRANGEBYSCORE', KEYS[1], '-inf', now(), 'LIMIT', 0, ARGV[1])
