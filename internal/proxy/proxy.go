// Package proxy carries calls between workloads: Inbound takes them from peers
// over mutual TLS and hands them to the application, Outbound takes them from
// the application and brings them to a peer or to a gateway.
//
// What happens to a call is the chain of its direction, a list in chain.go. A
// connection, or a stream of one that proxies share (package hop), has one
// goroutine, which also drives the upstream connection; Run
// owns them all and returns when they have ended. Rejudge closes at once what
// is open to a peer whose SVID was revoked; an upgraded connection is judged
// again by each policy and ends with the token that let it in, and neither it
// nor a tunnel outlives the peer's SVID by much.
package proxy

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/shadow"
	"sallyport/internal/tap"
	"sallyport/internal/telemetry"
)

// Shared is what both directions need.
type Shared struct {
	// Audit keeps the refusals that no judge has recorded. Required.
	Audit Recorder
	// Signals and Edges count what passes. Required.
	Signals *telemetry.Signals
	Edges   *telemetry.Edges
	// Metrics counts connections and what no judge sees, under the name of
	// Reporter. Optional.
	Metrics  *telemetry.Registry
	Reporter string
	// Tracer keeps the spans of calls. Nil: none is kept, and traces pass.
	Tracer *telemetry.Tracer
	// Taps show calls to whoever looks. Optional.
	Taps *tap.Taps
	// Log is for operators. Required.
	Log *slog.Logger
	// Shadows are the traces that are done for shadows, which the way in learns of
	// and the way out goes by. Without them a workload is believed of none.
	Shadows *shadow.Traces
	// Limits bound what a client may send. Zero means http1's defaults.
	Limits http1.Limits
	// MaxConns bounds the open connections of the listener. Default 10,000.
	MaxConns int
	// MaxInFlight bounds the calls that are being served. Default 2,048; one
	// peer may have half of them.
	MaxInFlight int
	// DrainTimeout bounds the calls in flight after Run's context has ended.
	// Default 25 s.
	DrainTimeout time.Duration
	// Now cuts the calls in flight when it ends, once Run's context has. Optional.
	Now context.Context

	// partTime is a field for tests.
	partTime time.Duration
}

// partTime is how long the ends of an upgraded connection may take to say
// farewell. Nothing else is carried meanwhile.
const partTime = 250 * time.Millisecond

// A Recorder keeps an audit record; when it returns, the record survives a
// crash of this process. *audit.Log is one.
type Recorder interface {
	Append(r *audit.Record) error
}

func (s Shared) validate() error {
	var errs []error
	for name, missing := range map[string]bool{
		"audit": s.Audit == nil, "signals": s.Signals == nil, "edges": s.Edges == nil, "log": s.Log == nil,
	} {
		if missing {
			errs = append(errs, errors.New(name+": missing"))
		}
	}
	return errors.Join(errs...)
}

func (s Shared) withDefaults() Shared {
	if s.MaxConns == 0 {
		s.MaxConns = 10_000
	}
	if s.MaxInFlight == 0 {
		s.MaxInFlight = 2048
	}
	if s.DrainTimeout == 0 {
		s.DrainTimeout = 25 * time.Second
	}
	if s.partTime == 0 {
		s.partTime = partTime
	}
	return s
}
