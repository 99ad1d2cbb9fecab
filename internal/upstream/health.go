package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// watchEvery is how often it is looked which endpoints are to be asked.
const watchEvery = 250 * time.Millisecond

// errSilent is what a check comes to that says nothing of the endpoint: its
// policy does not let us ask.
var errSilent = errors.New("says nothing")

// Watch asks the endpoints of services with a health check whether they are well,
// over mutual TLS and through their sidecars, as calls go. It returns nil when
// ctx has ended.
func (s *Services) Watch(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		now := time.Now().UnixNano()
		for _, g := range *s.table.Load() {
			h := g.cfg.Health
			if h == nil {
				continue
			}
			every := cmp.Or(h.Interval, 10*time.Second)
			for _, e := range g.all {
				if e.asking.Load() || now < e.askAt {
					continue
				}
				// A little apart, so that a fleet does not ask in step.
				e.askAt = now + int64(every) - int64(rand.N(every/10+1))
				e.asking.Store(true)
				wg.Go(func() {
					defer e.asking.Store(false)
					g.hear(e, time.Now().UnixNano(), g.ask(ctx, e))
				})
			}
		}
	}
}

// ask makes one check.
func (g *group) ask(ctx context.Context, e *endpoint) error {
	h := g.cfg.Health
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(h.Timeout, time.Second))
	defer cancel()
	c, err := e.pool.Get(ctx, h.TCP)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer c.Discard()
	if h.TCP {
		return nil
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	host := string(g.name) + "." + mesh.Domain
	verb, head, body := "GET", fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: sallyport-health\r\n\r\n", h.HTTP, host), []byte(nil)
	if h.GRPC != nil {
		verb, body = "POST", healthRequest(*h.GRPC)
		head = fmt.Sprintf("POST /grpc.health.v1.Health/Check HTTP/1.1\r\nHost: %s\r\nContent-Type: application/grpc\r\nTE: trailers\r\nConnection: TE\r\nContent-Length: %d\r\n\r\n", host, len(body))
	}
	if _, err := c.Write(append([]byte(head), body...)); err != nil {
		return err
	}
	var resp http1.Response
	for {
		if err := c.ReadResponse(&resp, verb); err != nil {
			return cmp.Or(ctx.Err(), err)
		}
		if !resp.Informational() {
			break
		}
	}
	switch {
	case resp.Status == 403 && resp.Get("sallyport-decision") != nil:
		return errSilent
	case resp.Status < 200 || resp.Status > 399:
		return fmt.Errorf("status %d", resp.Status)
	case h.GRPC == nil:
		return nil
	}
	var answer healthAnswer
	if _, rerr, werr := http1.CopyBody(&answer, c.Conn, resp.Body, http1.UntilClose, nil); rerr != nil || werr != nil {
		return errors.Join(rerr, werr)
	}
	if !serving(answer) {
		return errors.New("not serving")
	}
	return nil
}

// healthRequest is a HealthCheckRequest in its frame; the name has less than 128
// bytes, as routes see to.
func healthRequest(service string) []byte {
	var msg []byte
	if service != "" {
		msg = append([]byte{0x0a, byte(len(service))}, service...)
	}
	return append([]byte{0, 0, 0, 0, byte(len(msg))}, msg...)
}

// A healthAnswer holds what the health service of gRPC answers, and no more: the
// peer chooses how much it sends.
type healthAnswer []byte

// maxHealthAnswer is in bytes; a HealthCheckResponse has 7, in its frame.
const maxHealthAnswer = 1 << 10

func (a *healthAnswer) Write(p []byte) (int, error) {
	if len(*a)+len(p) > maxHealthAnswer {
		return 0, fmt.Errorf("the answer is longer than %d bytes", maxHealthAnswer)
	}
	*a = append(*a, p...)
	return len(p), nil
}

// serving reads a HealthCheckResponse: its only field says SERVING.
func serving(b []byte) bool { return len(b) >= 7 && b[0] == 0 && b[5] == 0x08 && b[6] == 1 }

// hear counts the answer of an endpoint, and puts it aside or takes it back when
// enough were alike.
func (g *standing) hear(e *endpoint, now int64, err error) {
	if errors.Is(err, errSilent) || errors.Is(err, context.Canceled) {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if (err == nil) != e.well {
		e.well, e.alike = err == nil, 0
	}
	e.alike++
	h := g.cfg.Health
	switch sick := e.sick.Load(); {
	case err != nil && !sick && e.alike >= cmp.Or(h.Unhealthy, 3):
		e.sickSince, e.sickWhy = now, err.Error()
		e.sick.Store(true)
	case err == nil && sick && e.alike >= cmp.Or(h.Healthy, 2):
		e.sick.Store(false)
	default:
		return
	}
	g.turn.Add(1)
	if g.change != nil {
		t := Trouble{Service: g.name, Dst: g.dst, Kind: Unhealthy, Address: e.addr, Since: time.Unix(0, now), Why: e.sickWhy}
		if err == nil {
			t.Kind, t.Why = Healthy, ""
		}
		g.change(t)
	}
}
