package http2

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mux"
)

// TestBodiesThatNobodyReads has many connections fill whatever they are allowed
// to with bodies that nobody reads: beyond what the protocol gives each of them,
// all have one budget, and those that find it spent go on with what they have.
func TestBodiesThatNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const conns, streams, limit, size = 12, 6, 1 << 20, 256 << 10
		budget := mux.NewBudget(limit)
		var mu sync.Mutex
		unread := map[*Lane]struct{}{}
		read := make(chan struct{})
		var wg sync.WaitGroup
		accept := func(reads bool) func(l *Lane) bool {
			return func(l *Lane) bool {
				l.OnCut(func() { l.Close() })
				wg.Go(func() {
					defer l.Close()
					r, err := http.ReadRequest(bufio.NewReaderSize(l, 128))
					if err != nil {
						return
					}
					if !reads {
						mu.Lock()
						unread[l] = struct{}{}
						mu.Unlock()
						<-read
						return
					}
					n, _ := io.Copy(io.Discard, r.Body) // what came tells
					if n == size {
						_, _ = io.WriteString(l, "HTTP/1.1 204 No Content\r\n\r\n")
					}
				})
				return true
			}
		}
		var open []*Conn
		begin := func(reads bool) *http.Transport {
			near, far := net.Pipe()
			c := Accepted(near, Config{Budget: budget}, accept(reads))
			open = append(open, c)
			wg.Go(func() { _ = c.Run() })
			return clientOn(far)
		}
		post := func(c *http.Transport) (status int) {
			r, err := http.NewRequest("POST", "http://a/", strings.NewReader(strings.Repeat("x", size)))
			if err != nil {
				t.Error(err)
				return 0
			}
			resp, err := c.RoundTrip(r)
			if err != nil {
				return 0
			}
			resp.Body.Close()
			return resp.StatusCode
		}
		for range conns {
			c := begin(false)
			for range streams {
				wg.Go(func() { post(c) })
			}
		}
		synctest.Wait()
		held, wide := 0, 0
		mu.Lock()
		for l := range unread {
			l.mu.Lock()
			held += l.got.in.Len() + l.got.joined
			l.mu.Unlock()
		}
		mu.Unlock()
		for _, c := range open {
			if c.room.Load() > firstWindow {
				wide++
			}
		}
		if most := conns*firstWindow + limit; held > most || held < limit {
			t.Errorf("%d bytes are held, of at most %d", held, most)
		}
		if used := budget.Used(); used > limit || wide == 0 {
			t.Errorf("%d bytes of the budget are used by %d connections", used, wide)
		}
		if got := post(begin(true)); got != 204 {
			t.Errorf("a call beside them got %d", got)
		}
		for _, c := range open {
			c.Sever()
		}
		synctest.Wait()
		if budget.Used() == 0 {
			t.Error("what is still held has left the budget")
		}
		close(read)
		wg.Wait()
		if used := budget.Used(); used != 0 {
			t.Errorf("%d bytes of the budget are used when all is over", used)
		}
	})
}

// clientOn calls over one connection, by HTTP/2 in clear.
func clientOn(c net.Conn) *http.Transport {
	t := &http.Transport{
		Protocols:       new(http.Protocols),
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return c, nil },
		MaxConnsPerHost: 1, // calls that begin together would each dial c
	}
	t.Protocols.SetUnencryptedHTTP2(true)
	return t
}

// A budgeted is a connection with a budget whose calls read no body before release.
type budgeted struct {
	*Conn
	client  *http.Transport
	release chan struct{}
	wg      sync.WaitGroup
}

func newBudgeted(budget *mux.Budget) *budgeted {
	near, far := net.Pipe()
	b := &budgeted{release: make(chan struct{})}
	b.Conn = Accepted(near, Config{Budget: budget}, func(l *Lane) bool {
		l.OnCut(func() { l.Close() })
		b.wg.Go(func() {
			defer l.Close()
			r, err := http.ReadRequest(bufio.NewReaderSize(l, 128))
			if err != nil {
				return
			}
			<-b.release
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(l, "HTTP/1.1 204 No Content\r\n\r\n")
		})
		return true
	})
	b.wg.Go(func() { _ = b.Run() })
	b.client = clientOn(far)
	return b
}

func (b *budgeted) post(t *testing.T, size int) {
	r, err := http.NewRequest("POST", "http://a/", strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		t.Error(err)
		return
	}
	resp, err := b.client.RoundTrip(r)
	if err != nil {
		t.Error(err)
		return
	}
	resp.Body.Close()
	if resp.StatusCode != 204 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

// TestAWindowIsGivenBack has a connection at rest keep no more of the budget than
// its peer may still send, and not that when others need it.
func TestAWindowIsGivenBack(t *testing.T) {
	for _, tc := range []struct {
		name  string
		limit int64
		ends  bool
	}{
		{"while there is memory", 64 << 20, false},
		{"while there is none", firstWindow, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				budget := mux.NewBudget(tc.limit)
				b := newBudgeted(budget)
				b.wg.Go(func() { b.post(t, 600<<10) })
				synctest.Wait()
				if budget.Used() == 0 {
					t.Fatal("the window has not grown")
				}
				close(b.release)
				synctest.Wait()
				time.Sleep(b.cfg.beat() + time.Millisecond)
				if used, may := budget.Used(), b.inLeft.Load()-firstWindow; b.Live() && used > max(may, 0) {
					t.Errorf("%d bytes are taken, and the peer may send %d", used, may)
				}
				time.Sleep(2 * b.cfg.beat())
				if used := budget.Used(); b.Live() == tc.ends || tc.ends && used != 0 {
					t.Errorf("lives %v, %d bytes are taken", b.Live(), used)
				}
				b.Close()
				b.client.CloseIdleConnections()
				b.wg.Wait()
				if used := budget.Used(); used != 0 {
					t.Errorf("%d bytes are taken when all is over", used)
				}
			})
		})
	}
}

// TestAWindowGrowsLater has the memory come that a peer waits for.
func TestAWindowGrowsLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		budget := mux.NewBudget(firstWindow)
		budget.Take(firstWindow)
		b := newBudgeted(budget)
		b.wg.Go(func() { b.post(t, 4*firstWindow) })
		synctest.Wait()
		if left := b.inLeft.Load(); left != 0 {
			t.Fatalf("the peer may send %d bytes", left)
		}
		budget.Give(firstWindow)
		time.Sleep(b.cfg.beat() + time.Millisecond)
		synctest.Wait()
		if b.room.Load() == firstWindow {
			t.Error("the window has not grown")
		}
		close(b.release)
		synctest.Wait()
		b.Close()
		b.client.CloseIdleConnections()
		b.wg.Wait()
	})
}
