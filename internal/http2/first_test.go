package http2

import (
	"bufio"
	"context"
	"errors"
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

// TestFirstWindowsAreBounded has many connections fill their first windows with
// bodies that nobody reads: there is memory for some, the other calls are broken
// off, and those of who has a share of its own go on.
func TestFirstWindowsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const conns, size, limit = 16, 60 << 10, 256 << 10
		all := mux.NewBudget(limit)
		hoarder, other := all.Part(limit/2, 0), all.Part(limit/2, 0)
		release := make(chan struct{})
		var wg sync.WaitGroup
		var mu sync.Mutex
		lanes, refused := map[*Lane]struct{}{}, 0
		begin := func(first *mux.Budget, reads bool) (*Conn, *http.Transport) {
			near, far := net.Pipe()
			cfg := Config{Budget: mux.NewBudget(1), First: first, Violated: func(r Reason) {
				mu.Lock()
				defer mu.Unlock()
				if refused++; r != Hoarded {
					t.Errorf("a call is broken off for %s", r)
				}
			}}
			c := Accepted(near, cfg, func(l *Lane) bool {
				l.OnCut(func() { l.Close() })
				wg.Go(func() {
					defer l.Close()
					r, err := http.ReadRequest(bufio.NewReaderSize(l, 128))
					if err != nil {
						return
					}
					if !reads {
						mu.Lock()
						lanes[l] = struct{}{}
						mu.Unlock()
						<-release
						return
					}
					if n, _ := io.Copy(io.Discard, r.Body); n == size { // what came tells
						_, _ = io.WriteString(l, "HTTP/1.1 204 No Content\r\n\r\n")
					}
				})
				return true
			})
			wg.Go(func() { _ = c.Run() })
			return c, clientOn(far)
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
		var open []*Conn
		for range conns {
			c, client := begin(hoarder, false)
			open = append(open, c)
			wg.Go(func() { post(client) })
		}
		synctest.Wait()
		held := 0
		mu.Lock()
		for l := range lanes {
			l.mu.Lock()
			held += l.got.in.Len() + l.got.joined
			l.mu.Unlock()
		}
		broken := refused
		mu.Unlock()
		if most := limit/2 + conns*spare; held > most || held < limit/4 || broken == 0 || broken == conns {
			t.Errorf("%d bytes are held, of at most %d; %d calls were broken off", held, most, broken)
		}
		if used := hoarder.Used(); used == 0 || used > limit/2 {
			t.Errorf("%d bytes are paid for", used)
		}
		c, client := begin(other, true)
		open = append(open, c)
		if got := post(client); got != 204 {
			t.Errorf("a call of another one got %d", got)
		}
		synctest.Wait()
		if used := other.Used(); used != 0 {
			t.Errorf("%d bytes that were read are still paid for", used)
		}
		for _, c := range open {
			c.Sever()
		}
		close(release)
		wg.Wait()
		if a, b := all.Used(), hoarder.Used(); a != 0 || b != 0 {
			t.Errorf("%d and %d bytes are paid for when all is over", a, b)
		}
	})
}

// TestWhoFindsNoMemoryIsNotCharged has calls end because others have taken all there
// is: the connection goes on.
func TestWhoFindsNoMemoryIsNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := mux.NewBudget(64 << 10)
		greedy, modest := all.Part(64<<10, 0), all.Part(64<<10, 0)
		greedy.Take(64 << 10)
		near, far := net.Pipe()
		ended := 0
		cfg := Config{Budget: mux.NewBudget(1), First: modest, Broken: func() bool { return false }, Violated: func(r Reason) {
			if ended++; r != Hoarded {
				t.Errorf("a call ends for %s", r)
			}
		}}
		var wg sync.WaitGroup
		release := make(chan struct{})
		c := Accepted(near, cfg, func(l *Lane) bool {
			l.OnCut(func() { l.Close() })
			wg.Go(func() {
				defer l.Close()
				r, err := http.ReadRequest(bufio.NewReaderSize(l, 128))
				if err != nil {
					return
				}
				if r.Method == "GET" {
					_, _ = io.WriteString(l, "HTTP/1.1 204 No Content\r\n\r\n")
					return
				}
				<-release // and reads nothing
			})
			return true
		})
		var err error
		wg.Go(func() { err = c.Run() })
		client := clientOn(far)
		dialled := false
		client.DialContext = func(context.Context, string, string) (net.Conn, error) {
			if dialled {
				return nil, net.ErrClosed
			}
			dialled = true
			return far, nil
		}
		ask := func(method string, body io.Reader) int {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			r, err := http.NewRequestWithContext(ctx, method, "http://a/", struct{ io.Reader }{body}) // which is not sent again
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.RoundTrip(r)
			if err != nil {
				return 0
			}
			resp.Body.Close()
			return resp.StatusCode
		}
		for range 3 {
			if got := ask("POST", strings.NewReader(strings.Repeat("x", 60<<10))); got != 0 {
				t.Errorf("a call for which there is no memory got %d", got)
			}
		}
		if ended != 3 {
			t.Errorf("%d of 3 calls were ended", ended)
		}
		if got := ask("GET", strings.NewReader("")); got != 204 {
			t.Errorf("a call afterwards got %d", got)
		}
		close(release)
		c.Sever()
		wg.Wait()
		var v *Violation
		if errors.As(err, &v) {
			t.Errorf("the connection ended by %v", err)
		}
	})
}
