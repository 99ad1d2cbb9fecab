package proxy

import "strings"

// A link is one step in the way of a call. Enter runs on the way in and may
// refuse; leave runs on the way out, if enter did not refuse. A link feels
// what stands below it in the list, never what stands above.
type link struct {
	name string
	// why says why the link stands at its place.
	why   string
	enter func(*call) *refusal
	leave func(*call)
}

// A chain is a list of links, outermost first. The last one carries the call.
type chain []link

// run takes the call through the chain and back. What panics ends the call and
// its connection; the links it had entered are left all the same.
func (c chain) run(x *call) {
	n := 0
	defer func() {
		if p := recover(); p != nil {
			x.panicked(p)
		}
		c[:n].leave(x)
	}()
	for ; n < len(c); n++ {
		if c[n].enter == nil {
			continue
		}
		if r := c[n].enter(x); r != nil {
			x.refuse(r)
			break
		}
	}
	if x.settled {
		n = 0
	}
}

// leave leaves the links, the last first.
func (c chain) leave(x *call) {
	for n := len(c) - 1; n >= 0; n-- {
		if c[n].leave != nil {
			c[n].leave(x)
		}
	}
}

func (c chain) String() string {
	var b strings.Builder
	for _, l := range c {
		b.WriteString(l.name + ": " + l.why + "\n")
	}
	return b.String()
}

// chain is the way of a call from a peer to the application.
func (in *Inbound) makeChain() chain {
	return chain{
		{"access record", "outermost: whatever became of the call is written down", nil, in.record},
		{"trace", "before anything that takes time, so that its time is seen", in.trace, nil},
		{"signals", "counts refusals below as well as answers", in.startClock, in.count},
		{"drain gate", "a draining proxy takes no new call on an old connection after this one", in.drainGate, nil},
		{"in-flight limit", "before the judge: a flood must not cost a decision each", in.enterFlight, in.leaveFlight},
		{"peer identity", "what was proved in the handshake must hold for each call", in.peerValid, nil},
		{"target", "the judge answers for one service; a call for another stops here", in.target, nil},
		{"method", "before all that speaks of methods and paths: they mean one thing, whichever way it was asked for", in.method, nil},
		{"rate limit", "before anything that costs: who calls too often must not cost a verification each", in.rateLimit, nil},
		{"introduction", "what the application is told of the caller; the name asked for has been checked", in.introduction, nil},
		{"deadline", "before the judge, whose time counts; the application is told what is left", in.deadline, nil},
		{"credential", "verified before the judge reads it; what a caller says of itself in our fields ends here", in.credential, nil},
		{"judge", "last before the application: what it saw is what is forwarded", in.judge, nil},
		{"application", "takes the Grant as proof", in.forward, nil},
	}
}

// chain is the way of a call from the application to a peer.
func (o *door) makeChain() chain {
	return chain{
		{"access record", "outermost: whatever became of the call is written down", nil, o.record},
		{"trace", "before anything that takes time, so that its time is seen", o.trace, nil},
		{"signals", "counts refusals below as well as answers", o.startClock, o.count},
		{"drain gate", "a draining proxy takes no new call on an old connection after this one", o.drainGate, nil},
		{"workload", "nothing is done for a process that is not the workload", o.ownProcess, nil},
		{"in-flight limit", "bounds what a runaway workload holds", o.enterFlight, o.leaveFlight},
		{"route", "one snapshot says which service is meant; below it the target is fixed", o.route, nil},
		{"limit", "once the route is known, and before anything that a call costs others", o.limit, nil},
		{"shadow's hands", "once the target is known: what is done for a shadow changes nothing", o.harmless, nil},
		{"shadow", "around all tries: a copy is of the one that was answered", o.mirror, o.mirrored},
		{"upstream", "retry around timeout around breaker around balance around dial", o.forward, nil},
	}
}

// The links that both directions share.

func (l *listener) drainGate(x *call) *refusal {
	x.ex.ToDown.Close = l.draining.Load()
	return nil
}

func (l *listener) enterFlight(x *call) *refusal {
	if n := l.inFlight.Add(1); n > int64(l.MaxInFlight) {
		l.inFlight.Add(-1)
		return &refusal{status: 503, reason: "overload", detail: "too many calls in flight"}
	}
	x.placed = true
	return nil
}

func (l *listener) leaveFlight(x *call) {
	if x.traced {
		x.traced = false
		l.Shadows.End(x.trace.ID)
	}
	x.vacate()
}

// vacate gives up the place of a call in flight: at its end, or before a refusal
// is written, which a client may take its time to read.
func (x *call) vacate() {
	if !x.placed {
		return
	}
	x.placed = false
	if x.of != nil {
		x.of.calls.Add(-1)
		x.of = nil
	}
	x.on.inFlight.Add(-1)
}
