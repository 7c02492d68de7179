"""Peak memory and time of one loss of N rows of 64 dimensions from Python: memory.py N."""

import sys, time, resource, numpy as np, ddtas
n=int(sys.argv[1]); d=64
rng=np.random.default_rng(0)
labels=np.repeat(np.arange(n//5),5)[:n].astype(np.int64)
c=rng.standard_normal((n//5,d)).astype(np.float32)
x=c[labels]+1.15*rng.standard_normal((n,d)).astype(np.float32)
x/=np.linalg.norm(x,axis=1,keepdims=True)
before=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
t=time.time(); out=ddtas.loss(x,labels); t=time.time()-t
after=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
g=out.gradient.nbytes
print(n, f"{t:.1f} s, peak grows by {(after-before)*1024/1e6:.0f} MB, of it gradient {g/1e6:.0f} MB; mined {out.mined}, a row {((after-before)*1024-g)/n:.0f} bytes")
