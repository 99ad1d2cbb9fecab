package rig

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Serve has serve speak with whoever connects to an address.
func Serve(address string, serve func(net.Conn)) error { return serveOn("tcp", address, serve) }

// serveOn is Serve on a network.
func serveOn(network, address string, serve func(net.Conn)) error {
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

// A Tally is what a load process reports that makes something again and again.
type Tally struct {
	Made    int64   `json:"made"`
	Fault   string  `json:"fault,omitempty"`
	Seconds float64 `json:"seconds"`
}

// Count has so many callers work until over, and reports what they made between
// warming up and the end.
func Count(callers int, warming, measured time.Duration, warm func(), work func(made *atomic.Int64, over *atomic.Bool) error) Tally {
	var made atomic.Int64
	var fault atomic.Pointer[error]
	var over atomic.Bool
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			if err := work(&made, &over); err != nil {
				fault.CompareAndSwap(nil, &err)
			}
		})
	}
	time.Sleep(warming)
	before, from := made.Load(), time.Now()
	warm()
	time.Sleep(measured)
	r := Tally{Made: made.Load() - before, Seconds: time.Since(from).Seconds()}
	over.Store(true)
	all.Wait()
	if err := fault.Load(); err != nil {
		r.Fault = (*err).Error()
	}
	return r
}
