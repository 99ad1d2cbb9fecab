package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/bench/rig"
)

// An order is calls at a rate, which are due whether those before are answered or
// not.
type order struct {
	Target string        `json:"target"`
	Path   string        `json:"path"`
	Conns  int           `json:"conns"`
	Rate   int           `json:"rate"` // calls a second
	Warm   time.Duration `json:"warm"` // not counted
	For    time.Duration `json:"for"`
}

// patience bounds every single answer.
const patience = 20 * time.Second

func (o order) run(warm func()) rig.Calls {
	var counting, over atomic.Bool
	var mu sync.Mutex // guards took and out
	var took []float64
	out := rig.Calls{}
	var all sync.WaitGroup
	gap := time.Second * time.Duration(o.Conns) / time.Duration(o.Rate)
	begin := time.Now().Add(20 * time.Millisecond) // when all have connected
	for n := range o.Conns {
		all.Go(func() {
			mine, err := o.calls(begin.Add(gap*time.Duration(n)/time.Duration(o.Conns)), gap, &counting, &over)
			mu.Lock()
			defer mu.Unlock()
			if took = append(took, mine...); err != nil {
				out.Failed++
				out.Fault = err.Error()
			}
		})
	}
	time.Sleep(o.Warm)
	counting.Store(true)
	from := time.Now()
	warm()
	time.Sleep(o.For)
	counting.Store(false)
	out.Seconds = time.Since(from).Seconds()
	over.Store(true)
	all.Wait()
	out.Requests = int64(len(took))
	out.P50, out.P99 = rig.Quantile(took, 0.5), rig.Quantile(took, 0.99)
	return out
}

func (o order) calls(due time.Time, gap time.Duration, counting, over *atomic.Bool) (took []float64, err error) {
	c, err := net.Dial("tcp", o.Target)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: origin.mesh.internal\r\n\r\n", o.Path)
	r := bufio.NewReader(c)
	for ; !over.Load(); due = due.Add(gap) {
		time.Sleep(time.Until(due))
		_ = c.SetDeadline(time.Now().Add(patience)) // what has no deadline fails otherwise
		if _, err := c.Write(request); err != nil {
			return took, err
		}
		if err := rig.SkipAnswer(r); err != nil {
			return took, err
		}
		if counting.Load() {
			took = append(took, float64(time.Since(due))/1e6)
		}
	}
	return took, nil
}

func serveOrigin(address string) error {
	body := make([]byte, 1<<10)
	s := &http.Server{Addr: address, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(body) // who asked sees a failure
	})}
	return s.ListenAndServe()
}

// serveDeaf takes calls and answers none.
func serveDeaf(address string) error {
	s := &http.Server{Addr: address, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
	})}
	return s.ListenAndServe()
}
