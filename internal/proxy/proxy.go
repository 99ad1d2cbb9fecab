// Package proxy carries calls between workloads: Inbound takes them from peers
// over mutual TLS and hands them to the application, Outbound takes them from
// the application and brings them to a peer or to a gateway.
//
// What happens to a call is the chain of its direction, a list in chain.go. A
// connection has one goroutine, which also drives the upstream connection; Run
// owns them all and returns when they have ended.
package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/http1"
	"sallyport/internal/telemetry"
)

// Shared is what both directions need.
type Shared struct {
	// Audit keeps the refusals that no judge has recorded. Required.
	Audit Recorder
	// Signals and Edges count what passes. Required.
	Signals *telemetry.Signals
	Edges   *telemetry.Edges
	// Log is for operators. Required.
	Log *slog.Logger
	// Limits bound what a client may send. Zero means http1's defaults.
	Limits http1.Limits
	// MaxConns bounds the open connections of the listener. Default 10,000.
	MaxConns int
	// MaxInFlight bounds the calls that are being served. Default 1,024.
	MaxInFlight int
	// DrainTimeout bounds the calls in flight after Run's context has ended.
	// Default 25 s.
	DrainTimeout time.Duration
}

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
		s.MaxInFlight = 1024
	}
	if s.DrainTimeout == 0 {
		s.DrainTimeout = 25 * time.Second
	}
	return s
}

// A listener accepts connections and knows the open ones.
type listener struct {
	Shared
	// serve handles one connection until it ends. It need not close it.
	serve func(ctx context.Context, c *conn)

	draining atomic.Bool
	inFlight atomic.Int64

	mu   sync.Mutex // guards open
	open map[*conn]struct{}
}

// A conn is one downstream connection.
type conn struct {
	net.Conn
	// state orders the end of an idle connection against its next call.
	state atomic.Int32
}

// The states of a conn.
const (
	idle int32 = iota
	busy
	ended
)

// begin marks the connection as carrying a call; false means that the drain
// has closed it first.
func (c *conn) begin() bool { return c.state.CompareAndSwap(idle, busy) }

// rest marks the connection as idle.
func (c *conn) rest() { c.state.CompareAndSwap(busy, idle) }

// run accepts from ln until ctx ends, then lets the calls in flight finish
// within the drain timeout.
func (l *listener) run(ctx context.Context, ln net.Listener) error {
	l.mu.Lock()
	l.open = map[*conn]struct{}{}
	l.mu.Unlock()
	hard, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() {
		l.draining.Store(true)
		ln.Close()
	})
	defer stop()
	err := l.accept(ctx, ln, func(c *conn) {
		wg.Go(func() {
			defer l.forget(c)
			l.serve(hard, c)
		})
	})
	ln.Close()
	l.draining.Store(true)
	l.closeIdle()
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	timer := time.NewTimer(l.DrainTimeout)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		cut()
		l.closeAll()
		<-done
	}
	return err
}

func (l *listener) accept(ctx context.Context, ln net.Listener, start func(*conn)) error {
	var wait time.Duration
	for {
		nc, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Out of descriptors, most likely: what is open goes on, and
			// accepting is tried again.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			l.Log.Error("accept failed", "err", err, "retry_in", wait)
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
			continue
		}
		wait = 0
		c := &conn{Conn: nc}
		l.mu.Lock()
		full := len(l.open) >= l.MaxConns
		if !full {
			l.open[c] = struct{}{}
		}
		l.mu.Unlock()
		if full {
			nc.Close()
			continue
		}
		start(c)
	}
}

func (l *listener) forget(c *conn) {
	c.Close()
	l.mu.Lock()
	delete(l.open, c)
	l.mu.Unlock()
}

// closeIdle closes the connections that carry no call now. One that has just
// received a request is not idle any more and gets its answer.
func (l *listener) closeIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		if c.state.CompareAndSwap(idle, ended) {
			c.Close()
		}
	}
}

func (l *listener) closeAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		c.Close()
	}
}
