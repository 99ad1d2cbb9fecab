package upstream

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/mesh"
)

// A coldPeer makes each connection in its own time, and counts.
type coldPeer struct {
	takes time.Duration
	err   error // what it says instead, after that time

	mu              sync.Mutex // guards the fields below
	now, most, made int
}

func (p *coldPeer) connect(ctx context.Context) (net.Conn, time.Time, error) {
	p.count(1)
	defer p.count(-1)
	select {
	case <-time.After(p.takes):
	case <-ctx.Done():
		return nil, time.Time{}, ctx.Err()
	}
	if p.err != nil {
		return nil, time.Time{}, p.err
	}
	p.mu.Lock()
	p.made++
	p.mu.Unlock()
	c, _ := net.Pipe()
	return c, time.Time{}, nil
}

func (p *coldPeer) count(d int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now += d
	p.most = max(p.most, p.now)
}

// pool returns a pool of connections to the peer, two dials at once.
func (p *coldPeer) pool() *Pool {
	cfg := Config{Generation: func() uint64 { return 0 }, MaxDials: 2, MaxIdleTime: time.Hour}
	pool := newPool(cfg.withDefaults(), target{})
	pool.connect = p.connect
	return pool
}

// settled checks that nobody waits and that no right to dial was lost.
func settled(t *testing.T, p *Pool) {
	t.Helper()
	synctest.Wait()
	if p.dialling != 0 || p.queue.Len() != 0 {
		t.Errorf("%d rights to dial are given away and %d callers wait, want none", p.dialling, p.queue.Len())
	}
	p.Close()
}

func TestACrowdSharesWhatAFewDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: time.Second}
		p := peer.pool()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				c, err := p.Get(t.Context(), false)
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(10 * time.Millisecond) // the call
				c.Put()
			})
		}
		wg.Wait()
		if peer.most != 2 || peer.made > 4 {
			t.Errorf("%d dials at once and %d in all, want 2 and hardly more", peer.most, peer.made)
		}
		settled(t, p)
	})
}

// A thousand callers that all pause now and then need each connection once.
func TestManyCallersKeepTheirConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: time.Millisecond}
		p := peer.pool()
		var wg sync.WaitGroup
		const callers = 1000
		for range callers {
			wg.Go(func() {
				for range 5 {
					c, err := p.Get(t.Context(), false)
					if err != nil {
						t.Error(err)
						return
					}
					time.Sleep(time.Second) // the call
					c.Put()
					time.Sleep(time.Second)
				}
			})
		}
		wg.Wait()
		if peer.made != callers {
			t.Errorf("%d connections were made for %d callers", peer.made, callers)
		}
		time.Sleep(p.cfg.MaxIdleTime)
		if synctest.Wait(); len(p.idle) != 0 {
			t.Errorf("%d connections are kept that nobody needs", len(p.idle))
		}
		settled(t, p)
	})
}

func TestCallsThatKeepTheirConnectionsDialInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: 3 * time.Second}
		p := peer.pool()
		start := time.Now()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				c, err := p.Get(t.Context(), true)
				if err != nil {
					t.Errorf("after %s: %v", time.Since(start), err)
					return
				}
				t.Cleanup(c.Discard)
			})
		}
		wg.Wait()
		// Longer than a dial may take, but something came all the time.
		if took := time.Since(start); took != 15*time.Second || peer.most != 2 {
			t.Errorf("it took %s with %d at once, want 15 s with 2", took, peer.most)
		}
		settled(t, p)
	})
}

func TestAWaiterTakesWhatComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{}
		p := peer.pool()
		lent := get(t, p, false)
		peer.takes = time.Minute // longer than anybody waits here
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			go p.Get(ctx, true) //nolint:errcheck // they hold the rights to dial
		}
		synctest.Wait()
		fresh, any := make(chan *Conn, 1), make(chan *Conn, 1)
		go func() { c, _ := p.Get(ctx, true); fresh <- c }()
		synctest.Wait()
		go func() { c, _ := p.Get(ctx, false); any <- c }()
		synctest.Wait()
		lent.Put()
		if c := <-any; c != lent || !c.Reused {
			t.Errorf("got %p, want the connection that came back, %p", c, lent)
		}
		cancel()
		if c := <-fresh; c != nil {
			t.Error("who asked for a new connection got an old one")
		}
		lent.Put()
		settled(t, p)
	})
}

func TestAWaiterThatGoesWakesTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: time.Second}
		p := peer.pool()
		for range 2 {
			go func() {
				if c, err := p.Get(t.Context(), true); err == nil {
					t.Cleanup(c.Discard)
				}
			}()
		}
		synctest.Wait()
		const waiters = 20
		var wg sync.WaitGroup
		for i := range waiters {
			ctx, cancel := context.WithCancel(t.Context())
			if i%2 == 0 { // in the moment in which the two dials end
				time.AfterFunc(time.Second, cancel)
			}
			wg.Go(func() {
				defer cancel()
				c, err := p.Get(ctx, true)
				if err == nil {
					t.Cleanup(c.Discard)
				} else if i%2 != 0 {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		settled(t, p)
	})
}

func TestAWaiterLeavesAnEndpointThatGivesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: time.Hour}
		p := peer.pool()
		start := time.Now()
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for range 2 {
			wg.Go(func() { _, _ = p.Get(ctx, false) })
		}
		synctest.Wait()
		for range 5 {
			wg.Go(func() {
				_, err := p.Get(ctx, false)
				if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != 5*time.Second {
					t.Errorf("after %s: %v, want the end of its time after 5 s", took, err)
				}
			})
		}
		time.Sleep(6 * time.Second)
		cancel()
		wg.Wait()
		settled(t, p)
	})
}

func TestARefusalPassesTheTurnOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer := &coldPeer{takes: time.Millisecond, err: errors.New("refused")}
		p := peer.pool()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := p.Get(t.Context(), false); err == nil || err.Error() != "refused" {
					t.Errorf("got %v, want what the peer said", err)
				}
			})
		}
		wg.Wait()
		settled(t, p)
	})
}

// A dial that panics is the end of one call, not of the endpoint.
func TestAPanicGivesTheRightToDialBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := (&coldPeer{}).pool()
		p.connect = func(context.Context) (net.Conn, time.Time, error) { panic("dial") }
		func() {
			defer func() { _ = recover() }()
			_, _ = p.Get(t.Context(), false)
		}()
		settled(t, p)
	})
}

// An endpoint that takes no connection within the time of its callers is left
// alone for a moment, and nothing is held against it.
func TestCallersInAHurryLeaveADeadEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGroup(2, mesh.Routes{})
		peers := []*coldPeer{{takes: time.Hour}, {takes: time.Millisecond}}
		for i, e := range g.all {
			e.pool = peers[i].pool()
			defer e.pool.Close()
		}
		failed := 0
		for range 200 {
			w := &Want{Until: time.Now().Add(10 * time.Millisecond), Hurried: true}
			c, err := g.lend(t.Context(), time.Now().UnixNano(), w)
			if err != nil {
				failed++
				continue
			}
			c.Discard()
			time.Sleep(time.Millisecond)
		}
		if failed > 5 {
			t.Errorf("%d of 200 calls waited for the endpoint that is dead", failed)
		}
		if n := g.all[0].pool.failures.Load(); n != 0 {
			t.Errorf("%d failures are held against it", n)
		}
		synctest.Wait()
	})
}
