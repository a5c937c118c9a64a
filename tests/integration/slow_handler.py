import time

print("about to wait for ever", flush=True)
time.sleep(1000)
