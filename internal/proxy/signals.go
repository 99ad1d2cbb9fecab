package proxy

import (
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
	"sallyport/internal/telemetry"
)

// outcome is how the call counts on the map of who calls whom.
func (x *call) outcome() telemetry.Outcome {
	switch {
	case x.refused != nil && x.refused.decision != "":
		return telemetry.Denied
	case x.tunnel:
		return telemetry.Allowed // how it ended says nothing of the service
	case x.err != nil || x.status() >= 500 || x.res.Status >= 500:
		return telemetry.Errored
	}
	return telemetry.Allowed
}

// place is where an edge counts how long the call took, if that says anything.
func (x *call) place() int {
	if x.tunnel || x.refused != nil {
		return telemetry.NoTime
	}
	return mesh.Bucket(time.Since(x.start))
}

// observe counts the call in its series and ends what began.
func (x *call) observe() {
	x.running.End()
	x.running = nil
	c := telemetry.Call{
		Code: x.status(), Status: x.grpc, Flag: x.flag(), End: time.Now(), Trace: &x.trace, Up: x.res.ReqBytes, Down: x.res.RespBytes,
	}
	c.Took = c.End.Sub(x.start)
	if t := &x.tries; t.plan != nil && x.res.ResponseStarted && t.began.After(x.start) {
		c.First = t.began.Sub(x.start)
	}
	x.series.Observe(&c)
	x.spans(&c)
}

// flag is why we answered in the service's place, or broke off.
func (x *call) flag() string {
	switch {
	case x.refused != nil:
		return x.refused.reason
	case x.err == nil || x.tunnel:
		return ""
	case http1.FailedSide(x.err) == http1.Client:
		return "client"
	}
	return "cut_off"
}

// runs counts the call as running in its series.
func (x *call) runs() {
	x.running = x.series
	x.running.Begin()
}
