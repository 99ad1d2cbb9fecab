package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/daemon"
)

// A hall is the store that some issuers share.
type hall struct {
	mu    sync.Mutex // guards the rest
	plan  []byte
	said  map[string][]byte
	alive map[string]bool
	edits int
	// before, when set, comes before a write of the plan.
	before func() error
}

func newHall() *hall { return &hall{said: map[string][]byte{}, alive: map[string]bool{}} }

func (h *hall) RootPlan(context.Context) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.plan, nil
}

func (h *hall) EditRootPlan(_ context.Context, edit func([]byte) (plan, root []byte, err error)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	plan, root, err := edit(h.plan)
	if err == nil && plan != nil && h.before != nil {
		err = h.before()
	}
	if err == nil && plan != nil {
		if len(root) == 0 {
			return errors.New("no root")
		}
		h.plan, h.edits = plan, h.edits+1
	}
	return err
}

func (h *hall) TellIssuers(_ context.Context, name string, said []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.said[name] = said
	return nil
}

func (h *hall) IssuersSay(context.Context) (map[string][]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string][]byte{}
	for name := range h.alive {
		out[name] = h.said[name]
	}
	return out, nil
}

func (h *hall) set(name string, alive bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if alive {
		h.alive[name] = true
	} else {
		delete(h.alive, name)
	}
}

// An ensemble is some issuers in a hall, with one fleet of proxies and a clock.
type ensemble struct {
	t     *testing.T
	hall  *hall
	fleet *fleet
	now   time.Time
	cfgs  map[string]Config
	cas   map[string]*CA
}

func newEnsemble(t *testing.T, names ...string) *ensemble {
	t.Helper()
	e := &ensemble{t: t, hall: newHall(), fleet: new(fleet), now: time.Now(), cfgs: map[string]Config{}, cas: map[string]*CA{}}
	for i, name := range names {
		cfg := e.config()
		if i > 0 {
			cfg.RootDir = e.rootOf(names[0])
		}
		e.cfgs[name] = cfg
		e.start(name)
	}
	e.round()
	return e
}

func (e *ensemble) config() Config {
	cfg := inFleet(config(e.t), e.fleet)
	cfg.SharedRoot, cfg.Now = true, func() time.Time { return e.now }
	return cfg
}

// rootOf copies the root of an issuer as an operator does.
func (e *ensemble) rootOf(name string) string {
	e.t.Helper()
	dir := e.t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		e.t.Fatal(err)
	}
	root := e.cas[name].state.root()
	for _, ext := range []string{".crt", ".key"} {
		data := must1(os.ReadFile(filepath.Join(e.cfgs[name].Dir, root+ext)))
		if err := os.WriteFile(filepath.Join(dir, "root"+ext), data, 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
	return dir
}

func (e *ensemble) start(name string) {
	e.t.Helper()
	c := open(e.t, e.cfgs[name])
	if err := e.join(name, c); err != nil {
		e.t.Fatal(err)
	}
	e.cas[name] = c
}

// join may run beside turns of other issuers. It closes c when it is refused.
func (e *ensemble) join(name string, c *CA) error {
	e.hall.set(name, true)
	err := c.Join(e.t.Context(), name, e.hall)
	if err != nil {
		c.Close()
		e.hall.set(name, false)
	}
	return err
}

func (e *ensemble) kill(name string) {
	e.cas[name].Close()
	delete(e.cas, name)
	e.hall.set(name, false)
}

// round lets every issuer look at the others, twice, as within two seconds.
func (e *ensemble) round() {
	e.t.Helper()
	for range 2 {
		for _, name := range slices.Sorted(maps.Keys(e.cas)) {
			e.turn(name)
		}
	}
}

func (e *ensemble) turn(name string) {
	e.t.Helper()
	c := e.cas[name]
	c.moving.Lock()
	err := c.meet(e.t.Context(), c.company)
	c.moving.Unlock()
	if err == nil {
		err = c.renew(e.t.Context())
	}
	if err != nil {
		e.t.Fatalf("issuer %s: %v", name, err)
	}
}

// sync lets the proxies learn what all issuers hand out, and renew at one.
func (e *ensemble) sync(renew bool, proxies ...string) {
	var ids []string
	var root string
	for _, c := range e.cas {
		b := c.Bundle()
		ids, root = append(ids, idsOf(b.X509)...), RootID(b.X509[0])
		for _, k := range b.JWT {
			ids = append(ids, k.KeyID)
		}
	}
	e.fleet.mu.Lock()
	defer e.fleet.mu.Unlock()
	for _, name := range proxies {
		i := slices.IndexFunc(e.fleet.all, func(h Holder) bool { return h.Name == name })
		if i < 0 {
			i = len(e.fleet.all)
			e.fleet.all = append(e.fleet.all, Holder{Name: name, Shows: []string{root}})
		}
		e.fleet.all[i].Trusts = ids
		if renew {
			e.fleet.all[i].Shows = []string{root}
		}
	}
}

// all demands that every issuer is in a phase, with these roots in this order.
func (e *ensemble) all(want Phase, roots ...string) {
	e.t.Helper()
	for name, c := range e.cas {
		if got := c.Rotation().Phase; got != want || !slices.Equal(idsOf(c.Bundle().X509), roots) {
			e.t.Fatalf("issuer %s: phase %s with %.8s, want %s with %.8s", name, got, idsOf(c.Bundle().X509), want, roots)
		}
		chain := issue(e.t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
		verify(e.t, chain, c.Bundle().X509[:1])
	}
}

func (e *ensemble) roots(name string) []string { return idsOf(e.cas[name].Bundle().X509) }

// rotate takes a step at an issuer, and lets the others follow.
func (e *ensemble) rotate(name string, force bool) {
	e.t.Helper()
	rotateNow(e.t, e.cas[name], force)
	e.round()
}

func TestIssuersReplaceTheRootTogether(t *testing.T) {
	e := newEnsemble(t, "a", "b", "c")
	e.sync(true, "p", "q")
	old := e.roots("a")[0]
	e.all(Steady, old)

	rotateNow(t, e.cas["b"], false)
	refused(t, e.cas["b"], "0 of 2 proxies and 1 of 3 issuers confirm, not yet issuer a, issuer c, p, q")
	e.round()
	young := e.roots("b")[1]
	e.all(Prepared, old, young)
	refused(t, e.cas["a"], "0 of 2 proxies and 3 of 3 issuers")
	e.sync(false, "p", "q")
	next := map[string]string{}
	for name, c := range e.cas {
		next[name] = c.state.JWT[slices.IndexFunc(c.state.JWT, isNext)].KeyID
	}
	// A proxy that does not know the next key of another issuer is not ready.
	e.fleet.all[1].Trusts = slices.DeleteFunc(slices.Clone(e.fleet.all[1].Trusts), func(id string) bool { return id == next["c"] })
	refused(t, e.cas["a"], "1 of 2 proxies", "not yet q")
	e.sync(false, "q")

	ready := e.cas["c"].state.Rotation.Ready
	rotateNow(t, e.cas["a"], false)
	refused(t, e.cas["a"], "1 of 3 issuers", "issuer b, issuer c")
	e.round()
	e.all(Activated, young, old)
	if c := e.cas["c"]; c.state.Intermediate != ready || c.Status().KeyID != next["c"] {
		t.Error("an issuer signs with another intermediate or key than the one it had ready")
	}
	e.rotate("c", false)
	e.all(Tainted, young, old)
	e.sync(true, "p", "q")
	e.now = e.now.Add(10 * time.Minute)
	e.round()
	e.rotate("b", false)
	e.all(Steady, young)
	for name, cfg := range e.cfgs {
		if files := must1(filepath.Glob(filepath.Join(cfg.Dir, "root*"))); len(files) != 2 {
			t.Errorf("issuer %s keeps %v", name, files)
		}
		if files := must1(filepath.Glob(filepath.Join(cfg.Dir, "intermediate*"))); len(files) != 2 {
			t.Errorf("issuer %s keeps %v", name, files)
		}
	}
	for name := range e.cfgs {
		e.kill(name)
		e.start(name)
	}
	e.all(Steady, young)
}

// TestAnIssuerDiesInEachPhase lets the issuer that took the step die after it:
// the others go on, and it follows when it comes back.
func TestAnIssuerDiesInEachPhase(t *testing.T) {
	for _, at := range []Phase{Prepared, Activated, Tainted, Steady} {
		t.Run(string(at), func(t *testing.T) {
			e := newEnsemble(t, "a", "b")
			e.sync(true, "p")
			for _, phase := range []Phase{Prepared, Activated, Tainted, Steady} {
				hand := "b"
				if e.cas["a"] != nil {
					hand = "a"
				}
				rotateNow(t, e.cas[hand], false)
				if phase == at {
					e.kill("a")
				}
				e.round()
				e.now = e.now.Add(10 * time.Minute)
				e.round()
				e.sync(phase != Prepared, "p")
				e.all(phase, e.roots("b")...)
			}
			now := e.roots("b")[0]
			e.start("a")
			e.round()
			e.all(Steady, now)
		})
	}
}

// TestALeaderKilledBetweenAnyTwoWrites takes each step at an issuer that is
// killed before its first write, its second and so on, to its disk or to the
// store: the other goes on, and both are of one mind when it is back.
func TestALeaderKilledBetweenAnyTwoWrites(t *testing.T) {
	kills := 0
	for _, tt := range []struct {
		step string
		from Phase
	}{
		{"prepare", Steady}, {"activate", Prepared}, {"taint", Activated}, {"revoke", Tainted},
		{"rollback", Prepared}, {"rollback", Activated}, {"emergency", Steady},
	} {
		for n, killed := 0, true; killed; n++ {
			e := newEnsemble(t, "a", "b")
			e.sync(true, "p")
			for e.cas["a"].Rotation().Phase != tt.from {
				e.rotate("a", true)
			}
			killed = e.killInStep("a", tt.step, n)
			if killed {
				kills++
			}
			e.round()
			e.start("a")
			e.round()
			e.all(e.cas["b"].Rotation().Phase, e.roots("b")...)
			for range 5 {
				if e.cas["b"].Rotation().Phase == Steady {
					break
				}
				e.rotate("b", true)
			}
			e.all(Steady, e.roots("b")[0])
		}
	}
	if kills < 20 {
		t.Errorf("killed %d times", kills)
	}
	t.Logf("killed %d times", kills)
}

// killInStep lets an issuer take a step and die before its n-th write. What is
// on its disk then is what it comes back with.
func (e *ensemble) killInStep(name, step string, n int) (killed bool) {
	e.t.Helper()
	c, cfg := e.cas[name], e.cfgs[name]
	left, disk := n, e.t.TempDir()
	die := func() error {
		if killed {
			return errors.New("dead")
		}
		if left--; left >= 0 {
			return nil
		}
		killed = true
		for _, file := range must1(filepath.Glob(filepath.Join(cfg.Dir, "*"))) {
			if err := os.WriteFile(filepath.Join(disk, filepath.Base(file)), must1(os.ReadFile(file)), 0o600); err != nil {
				e.t.Fatal(err)
			}
		}
		return errors.New("killed")
	}
	c.write = func(path string, data []byte, perm fs.FileMode) error {
		if err := die(); err != nil {
			return err
		}
		return daemon.WriteFile(path, data, perm)
	}
	e.hall.before = die
	if err := takeStep(c, step); (err != nil) != killed {
		e.t.Fatalf("%s, killed %t before write %d: %v", step, killed, n, err)
	}
	e.hall.before = nil
	e.kill(name)
	if killed {
		if err := os.Chmod(disk, 0o700); err != nil {
			e.t.Fatal(err)
		}
		cfg.Dir = disk
		e.cfgs[name] = cfg
	}
	return killed
}

func TestALiveIssuerThatLagsHoldsTheGate(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	rotateNow(t, e.cas["a"], false)
	e.sync(true, "p")
	e.turn("a")
	refused(t, e.cas["a"], "1 of 2 issuers", "not yet issuer b")
	// One that lives and has said nothing holds it too.
	e.turn("b")
	e.sync(true, "p")
	e.hall.set("new-1234", true)
	refused(t, e.cas["a"], "2 of 3 issuers", "not yet issuer new-1234")
	e.hall.set("new-1234", false)
	e.rotate("a", false)
	e.all(Activated, e.roots("a")...)
	// Once its lease is over, a dead one does not.
	e.kill("b")
	e.rotate("a", false)
	e.all(Tainted, e.roots("a")...)
}

func TestRollbackByManyIssuers(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	old := e.roots("a")[0]
	e.rotate("a", false)
	if _, err := e.cas["b"].Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.round()
	e.all(Steady, old)
	if _, err := e.cas["b"].Rollback(t.Context()); err == nil {
		t.Error("a rollback of nothing")
	}
	e.rotate("a", false)
	young := e.roots("a")[1]
	e.sync(true, "p")
	e.rotate("b", false)
	e.sync(true, "p")
	e.all(Activated, young, old)
	if _, err := e.cas["a"].Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.round()
	e.all(Withdrawn, old, young)
	e.sync(true, "p")
	e.now = e.now.Add(10 * time.Minute)
	e.round() // the pace is now at once
	e.all(Steady, old)
}

func TestEmergencyByManyIssuers(t *testing.T) {
	e := newEnsemble(t, "a", "b", "c")
	e.sync(true, "p")
	old := e.roots("a")[0]
	e.rotate("a", false)
	prepared := e.roots("a")[1]
	stolen := e.cfgs["c"]
	e.kill("c")
	ready := map[string]bool{} // JWT keys that lay beside what leaked
	for _, c := range e.cas {
		for _, k := range c.state.JWT {
			ready[k.KeyID] = ready[k.KeyID] || isNext(k)
		}
	}
	if _, err := e.cas["b"].Emergency(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.round()
	young := e.roots("b")[0]
	if young == old || young == prepared {
		t.Fatal("the root that signs is not new")
	}
	e.all(Tainted, young, old)
	for name, c := range e.cas {
		for _, k := range c.state.JWT {
			if ready[k.KeyID] {
				t.Errorf("issuer %s: JWT key %s was prepared before and is %s", name, k.KeyID, k.Role)
			}
		}
		e.thiefSigns(c, old)
		if _, err := c.Rollback(t.Context()); err == nil || !strings.Contains(err.Error(), "emergency") {
			t.Errorf("issuer %s rolls back: %v", name, err)
		}
	}
	e.sync(true, "p")
	e.now = e.now.Add(10 * time.Minute)
	e.round()
	e.all(Steady, young)

	// Who has the directory of an issuer that was gone gets no key of the new
	// root, and so no issuer comes of it.
	e.cfgs["c"] = stolen
	synctest.Test(t, func(t *testing.T) {
		e.t = t
		if err := e.join("c", open(t, e.cfgs["c"])); !errors.Is(err, errNoKey) || !strings.Contains(err.Error(), "ca.root_dir") {
			t.Errorf("got %v, want no key", err)
		}
	})
	e.t = t
	// With a copy of the new root it is an issuer again.
	fresh := e.config()
	fresh.RootDir = e.rootOf("a")
	e.cfgs["c"] = fresh
	e.start("c")
	e.round()
	e.all(Steady, young)
	e.rotate("c", false)
	e.all(Prepared, young, e.roots("c")[1])
}

// thiefSigns writes a plan by which a root that leaked signs again.
func (e *ensemble) thiefSigns(c *CA, leaked string) {
	e.t.Helper()
	keys, err := c.rootKeys()
	if err != nil {
		e.t.Fatal(err)
	}
	p, err := decodePlan(e.hall.plan, c.cfg.TrustDomain)
	if err != nil {
		e.t.Fatal(err)
	}
	p.Number++
	p.Phase, p.Emergency = Withdrawn, false
	slices.Reverse(p.Roots)
	forged, err := p.encode(c.cfg.TrustDomain, keys[leaked])
	if err != nil {
		e.t.Fatal(err)
	}
	if _, err := c.readPlan(forged); err == nil || !strings.Contains(err.Error(), "replaced in an emergency") {
		e.t.Errorf("a plan of the thief: %v", err)
	}
}

func TestAnIssuerThatMissedTwoRotations(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	e.kill("b")
	for range 2 {
		for range 4 {
			e.rotate("a", false)
			e.sync(true, "p")
			e.now = e.now.Add(10 * time.Minute)
			e.round()
		}
		e.all(Steady, e.roots("a")...)
	}
	e.start("b")
	e.round()
	e.all(Steady, e.roots("a")...)
}

func TestAnIssuerThatIsNewInARotation(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	cfg := e.config()
	cfg.RootDir = e.rootOf("a")
	e.rotate("a", false)
	c := open(t, cfg)
	done := make(chan error)
	go func() { done <- e.join("c", c) }()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			e.cas["c"] = c
			e.round()
			e.all(Prepared, e.roots("a")...)
			return
		default:
			e.turn("a")
		}
	}
}

func TestTwoOperatorsAtOnceTakeOneStep(t *testing.T) {
	e := newEnsemble(t, "a", "b", "c")
	e.sync(true, "p")
	var wg sync.WaitGroup
	var took, moved int
	var mu sync.Mutex
	for _, c := range e.cas {
		wg.Go(func() {
			_, err := c.Rotate(t.Context(), ByHand, false)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				took++
			case errors.Is(err, ErrGate):
				moved++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	e.round()
	if took != 1 || moved != 2 {
		t.Errorf("%d took a step and %d were refused", took, moved)
	}
	e.all(Prepared, e.roots("a")...)
}

func TestWhoWritesToTheStoreHasNoRoot(t *testing.T) {
	stranger := newEnsemble(t, "x")
	key := must1(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	edit := func(data []byte, how func(*plan)) []byte {
		p := must1(decodePlan(data, td))
		how(p)
		return must1(json.Marshal(p))
	}
	foreign := must1(decodePlan(stranger.hall.plan, td))
	for name, forge := range map[string]func([]byte) []byte{
		"a plan of a root of its own": func([]byte) []byte {
			return edit(stranger.hall.plan, func(p *plan) { p.Number = 9 })
		},
		"a root of its own beside ours": func(was []byte) []byte {
			return edit(was, func(p *plan) {
				p.Number, p.Phase, p.Roots = p.Number+1, Prepared, append(p.Roots, foreign.Roots[0])
				p.Vouchers = append(p.Vouchers, voucher{p.ids()[0], foreign.Roots[0].Cert, bytes.Repeat([]byte{1}, 70)})
			})
		},
		"a key of its own as that of an issuer": func(was []byte) []byte {
			return edit(was, func(p *plan) {
				p.Issuers["b"] = planIssuer{must1(key.PublicKey.ECDH()).Bytes(), time.Now()}
			})
		},
		"a step that nobody took": func(was []byte) []byte {
			return edit(was, func(p *plan) { p.Number++ })
		},
		"an unknown field": func(was []byte) []byte { return append([]byte(`{"x":1,`), was[1:]...) },
		"nothing":          func([]byte) []byte { return []byte("{}") },
		"no JSON":          func([]byte) []byte { return []byte("root") },
		"two roots of which none is the next": func(was []byte) []byte {
			return edit(was, func(p *plan) { p.Roots = append(p.Roots, p.Roots[0]) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnsemble(t, "a", "b")
			e.sync(true, "p")
			roots, good := e.roots("a"), e.hall.plan
			e.hall.plan = forge(good)
			for _, c := range e.cas {
				if _, err := c.Rotate(t.Context(), ByHand, true); err == nil {
					t.Error("a step on a forged plan")
				}
			}
			e.all(Steady, roots...)
			e.hall.plan = good
			e.rotate("a", false)
			e.all(Prepared, e.roots("a")...)
		})
	}
}

func TestAnOldPlanIsPutRight(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	past := e.hall.plan
	e.rotate("a", false)
	e.sync(true, "p")
	e.rotate("a", false)
	roots := e.roots("a")
	e.hall.plan = past // a backup of the database is restored
	e.round()
	e.all(Activated, roots...)
	e.round()
	e.rotate("b", false)
	e.all(Tainted, roots...)
	if p := must1(decodePlan(e.hall.plan, td)); len(p.Issuers) != 2 || p.Number <= 3 {
		t.Errorf("the plan is %d with issuers %v", p.Number, slices.Sorted(maps.Keys(p.Issuers)))
	}
}

// TestTheStoreHasNoKey looks for each private key of a root in all that was
// written to the store.
func TestTheStoreHasNoKey(t *testing.T) {
	e := newEnsemble(t, "a", "b")
	e.sync(true, "p")
	e.rotate("a", false)
	keys := must1(e.cas["a"].rootKeys())
	if len(keys) != 2 {
		t.Fatalf("%d keys", len(keys))
	}
	for id, key := range keys {
		d := must1(key.(*ecdsa.PrivateKey).Bytes())
		p := must1(decodePlan(e.hall.plan, td))
		for _, r := range p.Roots {
			for name, sealed := range r.Keys {
				if bytes.Contains(sealed, d) {
					t.Errorf("the key of %.16s is open to %s", id, name)
				}
			}
		}
		if bytes.Contains(e.hall.plan, d) {
			t.Errorf("the key of %.16s is in the plan", id)
		}
	}
	p := must1(decodePlan(e.hall.plan, td))
	a, b := e.cas["a"].company, e.cas["b"].company
	id := p.ids()[1]
	if _, err := unseal(a.secret, td, "a", id, p.Roots[1].Keys["b"]); err == nil {
		t.Error("a opens what is sealed for b")
	}
	if _, err := unseal(b.secret, td, "b", p.ids()[0], p.Roots[1].Keys["b"]); err == nil {
		t.Error("a sealed key counts for another root")
	}
}

// TestTheRootIsReplacedByTime lets three issuers run for the life of a root.
func TestTheRootIsReplacedByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, h := new(fleet), newHall()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		var cas []*CA
		dir := ""
		for i := range 3 {
			cfg := inFleet(config(t), f)
			cfg.SharedRoot, cfg.RootDir, cfg.Log = true, dir, slog.New(slog.DiscardHandler)
			cfg.RootTTL, cfg.IntermediateTTL, cfg.AllowShort = time.Hour, 15*time.Minute, true
			cfg.X509TTL, cfg.JWTTTL = 75*time.Second, 75*time.Second
			c := open(t, cfg)
			name := fmt.Sprint("issuer-", i)
			h.set(name, true)
			if err := c.Join(ctx, name, h); err != nil {
				t.Fatal(err)
			}
			if dir == "" {
				dir = cfg.Dir
			}
			cas = append(cas, c)
			wg.Go(func() {
				if err := c.Run(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		first := RootID(cas[0].Bundle().X509[0])
		// A proxy asks every issuer twice a minute. After an hour the next
		// replacement would begin.
		phases := map[Phase]bool{}
		for range 2 * 60 * 39 / 40 {
			var ids []string
			for _, c := range cas {
				b := c.Bundle()
				ids = append(ids, idsOf(b.X509)...)
				for _, k := range b.JWT {
					ids = append(ids, k.KeyID)
				}
			}
			f.mu.Lock()
			f.all = []Holder{{Name: "p", Trusts: ids, Shows: []string{RootID(cas[0].Bundle().X509[0])}}}
			f.mu.Unlock()
			for _, c := range cas {
				phases[c.Rotation().Phase] = true
				verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), c.Bundle().X509)
			}
			time.Sleep(30 * time.Second)
		}
		synctest.Wait()
		now := RootID(cas[0].Bundle().X509[0])
		if now == first || len(phases) != 4 {
			t.Errorf("after the life of the root the phases were %v", slices.Sorted(maps.Keys(phases)))
		}
		for _, c := range cas {
			if got := c.Rotation(); got.Phase != Steady || got.Roots[0].ID != now {
				t.Errorf("phase %s with root %.16s, want %.16s", got.Phase, got.Roots[0].ID, now)
			}
		}
	})
}
