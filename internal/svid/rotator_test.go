package svid

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/mesh"
)

// A fakeIssuer is a Minter whose entries and failures a test sets.
type fakeIssuer struct {
	ca *testCA

	mu      sync.Mutex // guards the rest
	ttl     time.Duration
	entries []mesh.Entry
	down    error
	refuse  map[string]bool // entry IDs
	hang    bool
	mints   map[string]int
	times   []time.Time // of each call to Trust
	keys    map[string]bool
	offset  time.Duration // of the issuer's clock
	old     *testCA       // trusted still; tainted when taint says so
	taint   bool
}

func entry(name string) mesh.Entry { return mesh.Entry{ID: name, SPIFFEID: id("/" + name)} }

func newIssuer(t *testing.T, ttl time.Duration, names ...string) *fakeIssuer {
	f := &fakeIssuer{ca: newCA(t, td), ttl: ttl, mints: map[string]int{}, keys: map[string]bool{}, refuse: map[string]bool{}}
	for _, n := range names {
		f.entries = append(f.entries, entry(n))
	}
	return f
}

func (f *fakeIssuer) set(change func()) { f.mu.Lock(); change(); f.mu.Unlock() }

func (f *fakeIssuer) count(name string) int { f.mu.Lock(); defer f.mu.Unlock(); return f.mints[name] }

func (f *fakeIssuer) Trust(ctx context.Context) (Trust, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.times = append(f.times, time.Now())
	if f.hang {
		f.mu.Unlock()
		<-ctx.Done()
		f.mu.Lock()
		return Trust{}, ctx.Err()
	}
	t := Trust{Bundle: f.ca.bundle()}
	if f.old != nil {
		roots := f.old.bundle().X509Authorities()
		for _, c := range roots {
			t.Bundle.AddX509Authority(c)
		}
		if f.taint {
			t.Tainted = roots
		}
	}
	return t, f.down
}

func (f *fakeIssuer) Entries(context.Context) ([]mesh.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.entries), f.down
}

func (f *fakeIssuer) MintX509(_ context.Context, e mesh.Entry, key crypto.Signer) ([]*x509.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		return nil, f.down
	}
	entryID := e.ID
	if f.refuse[entryID] {
		return nil, errors.New("entry refused")
	}
	pub, _ := x509.MarshalPKIXPublicKey(key.Public())
	if f.keys[string(pub)] {
		return nil, errors.New("key was used before")
	}
	f.keys[string(pub)] = true
	for _, e := range f.entries {
		if e.ID == entryID {
			f.mints[entryID]++
			tpl := f.ca.leaf(e.SPIFFEID.String(), f.ttl)
			tpl.NotBefore, tpl.NotAfter = tpl.NotBefore.Add(f.offset), tpl.NotAfter.Add(f.offset)
			return f.ca.issue(tpl, key.Public()), nil
		}
	}
	return nil, errors.New("no such entry")
}

func all(es []mesh.Entry) []mesh.Entry { return es }

// rotate runs a Rotator in the bubble and gives its Source.
func rotate(t *testing.T, f *fakeIssuer, change func(*RotatorConfig)) (*Source, *Rotator) {
	t.Helper()
	cfg := RotatorConfig{Source: NewSource(), Minter: f, Match: all, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	r, err := NewRotator(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	return cfg.Source, r
}

// pass lets fake time go by, in the bubble of a synctest.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func ids(s *Source) (out []string) {
	if st := s.Current(); st != nil {
		for _, i := range st.Identities {
			out = append(out, i.ID.Path())
		}
	}
	return out
}

func TestRotatorNeverLetsAnSVIDEnd(t *testing.T) {
	for _, ttl := range []time.Duration{5 * time.Second, time.Minute, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			f := newIssuer(t, ttl, "a", "b")
			s, _ := rotate(t, f, nil)
			const lives = 10
			for range 200 * lives {
				pass(ttl / 200)
				for _, i := range s.Current().Identities {
					// A certificate ends on a whole second: a life is up to one shorter.
					if left := time.Until(i.Expires()); left < (ttl-time.Second)/3 {
						t.Fatalf("ttl %s: %s has only %s left", ttl, i.ID, left)
					}
				}
			}
			if got := ids(s); !slices.Equal(got, []string{"/a", "/b"}) {
				t.Errorf("identities %v", got)
			}
			// 40 to 60 % of a life each: 16 to 25 renewals in ten lives, and the first.
			if n := f.count("a"); n < 16 || n > 27 {
				t.Errorf("ttl %s: %d SVIDs in %d lives", ttl, n, lives)
			}
		})
	}
}

func TestRotatorKeepsTheSVIDThroughAnOutageUntilItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		s, _ := rotate(t, f, nil)
		end := s.Current().Identities[0].Expires()
		f.set(func() { f.down = errors.New("issuer is down") })
		pass(time.Until(end) - time.Second)
		if got := ids(s); !slices.Equal(got, []string{"/a"}) {
			t.Fatalf("one second before the end: %v", got)
		}
		pass(2 * time.Second)
		if got := ids(s); len(got) != 0 {
			t.Fatalf("one second after the end: %v", got)
		}
		f.mu.Lock()
		var longest time.Duration
		for i := 1; i < len(f.times); i++ {
			longest = max(longest, f.times[i].Sub(f.times[i-1]))
		}
		n := len(f.times)
		f.mu.Unlock()
		if longest > 40*time.Second || n > 2000 {
			t.Errorf("%d tries in an hour, longest pause %s", n, longest)
		}
		f.set(func() { f.down = nil })
		pass(retryMax + time.Second)
		if got := ids(s); !slices.Equal(got, []string{"/a"}) {
			t.Errorf("after the outage: %v", got)
		}
	})
}

func TestRotatorSurvivesAnIssuerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, 9*time.Second, "a")
		s, _ := rotate(t, f, nil)
		f.set(func() { f.hang = true })
		pass(6 * time.Second)
		f.set(func() { f.hang = false })
		pass(2 * time.Second)
		if got := ids(s); !slices.Equal(got, []string{"/a"}) || f.count("a") < 2 {
			t.Errorf("identities %v after %d SVIDs", got, f.count("a"))
		}
	})
}

func TestRotatorFollowsEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a", "b")
		s, r := rotate(t, f, nil)
		steps := []struct {
			name   string
			change func()
			want   []string
			mints  int // of a, in all
		}{
			{"nothing new", func() {}, []string{"/a", "/b"}, 1},
			{"another order", func() { f.entries = []mesh.Entry{entry("b"), entry("a")} }, []string{"/b", "/a"}, 1},
			{"one withdrawn", func() { f.entries = []mesh.Entry{entry("a")} }, []string{"/a"}, 1},
			{"one added", func() { f.entries = []mesh.Entry{entry("a"), entry("c")} }, []string{"/a", "/c"}, 1},
			{"a shorter life", func() { f.entries[0].X509TTL = time.Minute }, []string{"/a", "/c"}, 2},
			{"one refused keeps the others", func() { f.entries = []mesh.Entry{entry("d"), f.entries[0]}; f.refuse["d"] = true }, []string{"/a"}, 2},
			{"all withdrawn", func() { f.entries = nil }, nil, 2},
		}
		for _, step := range steps {
			f.set(step.change)
			r.Sync()
			synctest.Wait()
			if d := cmp.Diff(step.want, ids(s)); d != "" {
				t.Errorf("%s: %s", step.name, d)
			}
			if n := f.count("a"); n != step.mints {
				t.Errorf("%s: %d SVIDs of a, want %d", step.name, n, step.mints)
			}
		}
		if s.Current() == nil {
			t.Error("withdrawing everything left no state")
		}
	})
}

func TestRotatorRenewsUnderANewRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		s, r := rotate(t, f, nil)
		f.set(func() { f.ca = newCA(t, td) })
		r.Sync()
		synctest.Wait()
		if got := ids(s); !slices.Equal(got, []string{"/a"}) || !s.Current().Bundle.Equal(f.ca.bundle()) || f.count("a") != 2 {
			t.Errorf("identities %v, %d SVIDs", got, f.count("a"))
		}
	})
}

func TestRotatorRenewsUnderATaintedRootAtOnceAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		s, r := rotate(t, f, nil)
		f.set(func() { f.old, f.ca = f.ca, newCA(t, td) })
		r.Sync()
		synctest.Wait()
		if n := f.count("a"); n != 1 {
			t.Errorf("a second root alone: %d SVIDs, want the first one only", n)
		}
		f.set(func() { f.taint, f.down = true, errors.New("down") })
		r.Sync()
		synctest.Wait()
		if len(ids(s)) != 1 {
			t.Error("the SVID was dropped before there is another")
		}
		f.set(func() { f.down = nil })
		r.Sync()
		pass(5 * time.Minute)
		if n := f.count("a"); n != 2 {
			t.Errorf("after the taint: %d SVIDs, want 2", n)
		}
		if root := s.Current().Identities[0].Root(s.Current().Bundle); !f.ca.bundle().HasX509Authority(root) {
			t.Error("the SVID stands under the tainted root")
		}
	})
}

func TestTriggerRenewsEverythingNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a", "b")
		_, r := rotate(t, f, nil)
		r.Trigger()
		r.Trigger()
		synctest.Wait()
		if f.count("a") < 2 || f.count("b") < 2 {
			t.Errorf("%d and %d SVIDs", f.count("a"), f.count("b"))
		}
	})
}

func TestClockJumpRenewsAtOnce(t *testing.T) {
	for _, jump := range []time.Duration{10 * time.Minute, -10 * time.Minute, 26 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			f := newIssuer(t, time.Hour, "a")
			var mu sync.Mutex
			var offset time.Duration
			wall := func() time.Time {
				mu.Lock()
				defer mu.Unlock()
				return time.Now().Add(offset).Round(0)
			}
			s, _ := rotate(t, f, func(c *RotatorConfig) { c.now = wall; c.Source.now = wall })
			pass(2 * time.Second)
			f.set(func() { f.offset = jump })
			mu.Lock()
			offset = jump
			mu.Unlock()
			pass(tick + time.Millisecond)
			if f.count("a") != 2 || len(ids(s)) != 1 {
				t.Errorf("jump by %s: %d SVIDs, identities %v", jump, f.count("a"), ids(s))
			}
			pass(2 * time.Second)
			if f.count("a") != 2 {
				t.Errorf("jump by %s: renewed again without cause", jump)
			}
		})
	}
}

func TestRotatorStartsFromDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		f.down = errors.New("issuer is down")
		var saved []*State
		src := f.ca.source()
		old := f.ca.identity(id("/a"), 30*time.Minute)
		old.EntryID = "a"
		if err := src.Set(&State{Bundle: f.ca.bundle(), Identities: []Identity{old}}); err != nil {
			t.Fatal(err)
		}
		s, _ := rotate(t, f, func(c *RotatorConfig) {
			c.Source = src
			c.Save = func(st *State) error { saved = append(saved, st); return nil }
		})
		pass(10 * time.Minute)
		if got := ids(s); !slices.Equal(got, []string{"/a"}) || len(saved) != 0 {
			t.Fatalf("during the outage: %v, saved %d times", got, len(saved))
		}
		f.set(func() { f.down = nil })
		pass(retryMax)
		if f.count("a") != 1 || len(saved) != 1 || saved[0].Identities[0].Chain[0].Equal(old.Chain[0]) {
			t.Errorf("after the outage: %d SVIDs, saved %d times", f.count("a"), len(saved))
		}
	})
}

func TestIssuerThatGivesAnotherIdentityIsNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newIssuer(t, time.Hour, "a")
		f.entries = append(f.entries, mesh.Entry{ID: "a", SPIFFEID: id("/other")})
		s, _ := rotate(t, f, func(c *RotatorConfig) {
			c.Match = func(es []mesh.Entry) []mesh.Entry { return es[1:] } // the issuer signs the first
		})
		if got := ids(s); len(got) != 0 {
			t.Errorf("identities %v", got)
		}
	})
}

func TestRotatorConfigNamesEveryMistake(t *testing.T) {
	_, err := NewRotator(RotatorConfig{Poll: -1})
	want := "rotator: source: missing\nminter: missing\nmatch: missing\nlog: missing\npoll: -1ns is negative"
	if err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
}
