package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"
)

// A Loaded is a pair under the load of a bench, whose orders are of type O.
type Loaded[O any] struct {
	Pair
	// Trace says that calls carry a trace header.
	Trace bool
	Load  *Loader[O, Calls]
}

// Best starts a pair with one worker and with one for each core, and keeps the
// one that answers more requests of an order.
func Best[O any](w io.Writer, start func(n int) (*Loaded[O], error), order func(*Loaded[O]) O) (*Loaded[O], error) {
	var kept *Loaded[O]
	most := int64(0)
	for _, n := range []int{1, runtime.NumCPU()} {
		p, err := start(n)
		if err != nil {
			return nil, err
		}
		r, err := p.Load.Do(order(p), func() {})
		if err == nil && r.Failed > 0 {
			err = errors.New(r.Fault)
		}
		if err != nil {
			p.Stop()
			return nil, fmt.Errorf("%s: %w", p.Name, err)
		}
		fmt.Fprintf(w, "tried %s: %d requests in %.1f s\n", p.Name, r.Requests, r.Seconds)
		if r.Requests <= most {
			p.Stop()
			continue
		}
		if kept != nil {
			kept.Stop()
		}
		kept, most = p, r.Requests
	}
	return kept, nil
}

// Await waits until the policy has reached both sidecars: until an order, a short
// one, is carried out.
func (p *Loaded[O]) Await(ctx context.Context, o O) error {
	for end := time.Now().Add(30 * time.Second); ; {
		r, err := p.Load.Do(o, func() {})
		if err != nil {
			return err
		}
		if r.Failed == 0 && r.Requests > 0 {
			return nil
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("%s does not answer: %s", p.Name, r.Fault)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Profile writes what both sidecars do for 10 s of an order to file-client and
// file-server.
func (p *Loaded[O]) Profile(ctx context.Context, file string, o O) error {
	done := make(chan error, 2)
	_, err := p.Load.Do(o, func() {
		for i, half := range []string{"server", "client"} {
			go func() { done <- p.Procs[i].Profile(ctx, file+"-"+half, 10*time.Second) }()
		}
	})
	return errors.Join(err, <-done, <-done)
}
