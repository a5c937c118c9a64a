-- Take a record: the one moment at which an invocation becomes an executor. Atomic, so that of two
-- deliveries of one event only one gets the work.
--
-- ARGV  1 executor  2 nonce, fresh for each incarnation
-- reply {OK, gen, seq, lease, facts, frontier} | {GONE} | {HELD}
local x, nonce = ARGV[1], ARGV[2]
local job = call('HMGET', JOB, 'state', 'lease', 'attempts', 'facts')
if job[1] ~= 'running' then return { 'GONE' } end
local r = load_record(x)
if not r then return { 'GONE' } end
if r.nonce ~= nonce then
  local t = now()
  if r.nonce ~= '' and tonumber(call('ZSCORE', LIVE, x)) > t then return { 'HELD' } end
  if r.gen >= tonumber(job[3]) then
    finish_job('failed', cmsgpack.pack({ 'lost', x, r.gen, call('HGET', REC, x .. '/f') }))
    return { 'GONE' }
  end
  r.nonce, r.gen, r.unstarted = nonce, r.gen + 1, 0
  call('HSET', REC, x, pack_record(r))
  call('ZADD', LIVE, 'XX', t + job[2] * math.min(2 ^ (r.gen - 1), LONGEST), x)
  call('HINCRBY', JOB, 'begins', 1)
end
return { 'OK', r.gen, r.seq, job[2] * math.min(2 ^ (r.gen - 1), LONGEST), job[4],
  call('HGET', REC, x .. '/f') }
