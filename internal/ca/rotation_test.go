package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/daemon"
	"sallyport/internal/meshtest"
)

// A fleet is some live proxies whose trust and SVIDs a test sets.
type fleet struct {
	mu      sync.Mutex // guards the rest
	unknown bool
	all     []Holder
}

func (f *fleet) holders() ([]Holder, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.all), !f.unknown
}

// sync lets the proxies with the names fetch the bundle and, when renew, SVIDs.
func (f *fleet) sync(c *CA, renew bool, names ...string) {
	b := c.Bundle()
	ids := idsOf(b.X509)
	for _, k := range b.JWT {
		ids = append(ids, k.KeyID)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range names {
		i := slices.IndexFunc(f.all, func(h Holder) bool { return h.Name == name })
		if i < 0 {
			i = len(f.all)
			f.all = append(f.all, Holder{Name: name, Shows: []string{RootID(b.X509[0])}})
		}
		f.all[i].Trusts = ids
		if renew {
			f.all[i].Shows = []string{RootID(b.X509[0])}
		}
	}
}

func inFleet(cfg Config, f *fleet) Config {
	cfg.Holders = f.holders
	return cfg
}

// phase fails the test unless the rotation is in a phase with so many roots.
func phase(t *testing.T, c *CA, want Phase, roots, tainted int) {
	t.Helper()
	b := c.Bundle()
	if got := c.Rotation().Phase; got != want || len(b.X509) != roots || len(b.Tainted) != tainted {
		t.Fatalf("phase %s with %d roots, %d tainted; want %s, %d, %d", got, len(b.X509), len(b.Tainted), want, roots, tainted)
	}
}

func rotateNow(t *testing.T, c *CA, force bool) {
	t.Helper()
	if _, err := c.Rotate(t.Context(), ByHand, force); err != nil {
		t.Fatal(err)
	}
}

// refused demands that the next step waits, and says all of these.
func refused(t *testing.T, c *CA, want ...string) {
	t.Helper()
	_, err := c.Rotate(t.Context(), ByHand, false)
	if !errors.Is(err, ErrGate) {
		t.Fatalf("got %v, want ErrGate", err)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: want %q", err, w)
		}
	}
}

func TestRotationThroughEveryGate(t *testing.T) {
	f, now := new(fleet), time.Now()
	cfg := inFleet(config(t), f)
	cfg.Now = func() time.Time { return now }
	c := open(t, cfg)
	server := c.NewServer()
	old := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	first, oldRoot, oldKey := must1(server.Certificate(t.Context())), c.Bundle().X509[0], c.Status().KeyID
	f.sync(c, true, "a", "b")

	rotateNow(t, c, false)
	phase(t, c, Prepared, 2, 0)
	newRoot := c.Bundle().X509[1]
	verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), []*x509.Certificate{oldRoot})
	refused(t, c, "0 of 2 proxies confirm, not yet a, b; next: wait")
	f.sync(c, true, "a")
	refused(t, c, "1 of 2", "not yet b")

	f.sync(c, true, "b")
	rotateNow(t, c, false)
	phase(t, c, Activated, 2, 0)
	fresh := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	verify(t, fresh, []*x509.Certificate{newRoot})
	verify(t, old, c.Bundle().X509)
	if s := must1(server.Certificate(t.Context())); s == first || s.Leaf.CheckSignatureFrom(fresh[1]) != nil {
		t.Error("the issuer's own certificate is not of the new root")
	}
	if c.Status().KeyID == oldKey {
		t.Error("the old JWT key signs")
	}

	rotateNow(t, c, false)
	phase(t, c, Tainted, 2, 1)
	if !c.Bundle().Tainted[0].Equal(oldRoot) {
		t.Error("the new root is tainted")
	}
	for _, k := range c.Bundle().JWT {
		if k.Tainted != (k.KeyID == oldKey) {
			t.Errorf("key %s tainted: %v", k.KeyID, k.Tainted)
		}
	}
	refused(t, c, "0 of 2")
	f.sync(c, true, "a", "b")
	refused(t, c, "tokens under the old key are valid until")
	now = now.Add(cfg.withDefaults().JWTTTL + time.Second)

	rotateNow(t, c, false)
	phase(t, c, Steady, 1, 0)
	if !c.Bundle().X509[0].Equal(newRoot) || len(c.Bundle().JWT) != 1 {
		t.Errorf("bundle %+v", c.Bundle())
	}
	if files := must1(filepath.Glob(filepath.Join(cfg.Dir, "root*"))); len(files) != 2 {
		t.Errorf("files %v", files)
	}
	c.Close()
	verify(t, issue(t, open(t, cfg), X509Request{ID: web, PublicKey: anyKey.Public()}), []*x509.Certificate{newRoot})
}

func TestRotationForcedPastStragglersAndWithoutKnowledge(t *testing.T) {
	f := &fleet{unknown: true}
	c := open(t, inFleet(config(t), f))
	rotateNow(t, c, false)
	refused(t, c, "does not know yet which proxies live")
	for _, want := range []Phase{Activated, Tainted, Steady} {
		rotateNow(t, c, true)
		if got := c.Rotation().Phase; got != want {
			t.Fatalf("phase %s, want %s", got, want)
		}
	}
}

func TestRollback(t *testing.T) {
	for _, from := range []Phase{Prepared, Activated, Tainted} {
		t.Run(string(from), func(t *testing.T) {
			f, now := new(fleet), time.Now()
			cfg := inFleet(config(t), f)
			cfg.Now = func() time.Time { return now }
			c := open(t, cfg)
			root, kid := c.Bundle().X509[0], c.Status().KeyID
			for c.Rotation().Phase != from {
				f.sync(c, true, "a")
				rotateNow(t, c, false)
			}
			f.sync(c, true, "a")
			chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
			if _, err := c.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !c.Bundle().X509[0].Equal(root) || c.Status().KeyID != kid {
				t.Error("the old root or key does not sign")
			}
			verify(t, chain, c.Bundle().X509)
			verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), []*x509.Certificate{root})
			if from != Prepared {
				phase(t, c, Withdrawn, 2, 1)
				if _, err := c.Rollback(t.Context()); err == nil || !strings.Contains(err.Error(), "rolled back already") {
					t.Errorf("second rollback: %v", err)
				}
				refused(t, c, "0 of 1")
				f.sync(c, true, "a")
				now = now.Add(time.Hour)
				if err := c.renew(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			phase(t, c, Steady, 1, 0)
			if _, err := c.Rollback(t.Context()); err == nil || !strings.Contains(err.Error(), "no rotation is under way") {
				t.Errorf("rollback of nothing: %v", err)
			}
		})
	}
}

func TestEmergencyFromEveryPhase(t *testing.T) {
	for _, from := range []Phase{Steady, Prepared, Activated, Tainted} {
		t.Run(string(from), func(t *testing.T) {
			f, now := new(fleet), time.Now()
			cfg := inFleet(config(t), f)
			cfg.Now = func() time.Time { return now }
			c := open(t, cfg)
			server := c.NewServer()
			for f.sync(c, true, "a", "b"); c.Rotation().Phase != from; f.sync(c, true, "a", "b") {
				rotateNow(t, c, false)
			}
			trusted := c.Bundle().X509
			if from == Prepared {
				trusted = trusted[:1]
			}
			r, err := c.Emergency(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			phase(t, c, Tainted, len(trusted)+1, len(trusted))
			if want := (Gate{Step: StepRevoke, Live: 2, Stragglers: []string{"a", "b"}, Known: true, NotBefore: r.Gate.NotBefore}); cmp.Diff(want, r.Gate) != "" || !r.Emergency {
				t.Errorf("gate %+v", r.Gate)
			}
			verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), c.Bundle().X509[:1])
			own := must1(server.Certificate(t.Context()))
			verify(t, []*x509.Certificate{own.Leaf, must1(x509.ParseCertificate(own.Certificate[1]))}, trusted)

			f.sync(c, true, "a", "b")
			if err := c.renew(t.Context()); err != nil {
				t.Fatal(err)
			}
			own = must1(server.Certificate(t.Context()))
			verify(t, []*x509.Certificate{own.Leaf, must1(x509.ParseCertificate(own.Certificate[1]))}, c.Bundle().X509[:1])
			now = now.Add(time.Hour)
			if err := c.renew(t.Context()); err != nil {
				t.Fatal(err)
			}
			phase(t, c, Steady, 1, 0)
		})
	}
}

func TestRotationByTime(t *testing.T) {
	f := new(fleet)
	cfg := inFleet(config(t), f)
	cfg.AllowShort = true
	cfg.RootTTL, cfg.IntermediateTTL, cfg.X509TTL, cfg.JWTTTL = time.Hour, 2*time.Minute, 10*time.Second, 10*time.Second
	synctest.Test(t, func(t *testing.T) {
		c, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		start, root := time.Now(), c.Bundle().X509[0]
		var seen []string
		for last := Steady; len(seen) < 4; {
			changed := c.Changed()
			f.sync(c, true, "a")
			if p := c.Rotation().Phase; p != last {
				last = p
				seen = append(seen, fmt.Sprintf("%s at %v", p, time.Since(start).Round(2*time.Second)))
			}
			<-changed
		}
		if d := cmp.Diff([]string{"prepared at 30m0s", "activated at 50m0s", "tainted at 50m10s", "steady at 50m20s"}, seen); d != "" {
			t.Error(d)
		}
		if c.Bundle().X509[0].Equal(root) {
			t.Error("the root is the old one")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestASharedRootIsReplacedByForceAlone(t *testing.T) {
	cfg, now := inFleet(config(t), new(fleet)), time.Now()
	cfg.Now, cfg.SharedRoot = func() time.Time { return now }, true
	c := open(t, cfg)
	refused(t, c, "other issuers sign under this root", "; next: stop the others")
	if _, err := c.Emergency(t.Context()); !errors.Is(err, ErrGate) {
		t.Errorf("emergency: %v", err)
	}
	now = now.Add(360 * 24 * time.Hour)
	if err := c.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	phase(t, c, Steady, 1, 0)
	for _, want := range []Phase{Prepared, Activated, Tainted, Steady} {
		rotateNow(t, c, true)
		if got := c.Rotation().Phase; got != want {
			t.Fatalf("phase %s, want %s", got, want)
		}
	}
}

func TestSchedule(t *testing.T) {
	at := func(days int) time.Time { return time.Unix(0, 0).Add(time.Duration(days) * 24 * time.Hour) }
	s := scheduleOf(at(0), at(360), 7*24*time.Hour, time.Hour)
	for _, tt := range []struct {
		name   string
		phase  Phase
		pace   Pace
		day    int
		step   Step
		forced bool
	}{
		{"young", Steady, "", 179, "", false},
		{"half of its life", Steady, "", 180, StepPrepare, false},
		{"prepared too early", Prepared, ByTime, 299, "", false},
		{"prepared, five sixths", Prepared, ByTime, 300, StepActivate, false},
		{"prepared by hand, five sixths", Prepared, ByHand, 300, StepActivate, false},
		{"prepared, at once", Prepared, AtOnce, 1, StepActivate, false},
		{"prepared, near the end", Prepared, ByHand, 353, StepActivate, true},
		{"activated by time", Activated, ByTime, 1, StepTaint, false},
		{"activated by hand", Activated, ByHand, 1, "", false},
		{"tainted by time", Tainted, ByTime, 1, StepRevoke, false},
		{"tainted by hand", Tainted, ByHand, 1, "", false},
		{"withdrawn", Withdrawn, ByHand, 1, StepDiscard, false},
	} {
		r := &rotation{Phase: tt.phase, Pace: tt.pace, Since: at(0)}
		if tt.phase == Steady {
			r = nil
		}
		if step, forced := s.due(r, at(tt.day)); step != tt.step || forced != tt.forced {
			t.Errorf("%s: step %q, forced %v", tt.name, step, forced)
		}
	}
}

func TestGateCountsOnlyWhatIsSaid(t *testing.T) {
	d := demand{trusts: []string{"n"}, notShown: []string{"o"}}
	for name, h := range map[string]Holder{
		"says nothing":           {},
		"does not trust the new": {Trusts: []string{"o"}, Shows: []string{"n"}},
		"shows the old":          {Trusts: []string{"n"}, Shows: []string{"n", "o"}},
		"does not say its SVIDs": {Trusts: []string{"n"}},
	} {
		if g := d.count(StepRevoke, []Holder{h}, true); g.Confirmed != 0 || g.Open(time.Now()) == nil {
			t.Errorf("a proxy that %s confirms", name)
		}
	}
	if g := d.count(StepRevoke, []Holder{{Trusts: []string{"o", "n"}, Shows: []string{"n"}}}, true); g.Open(time.Now()) != nil {
		t.Errorf("got %v", g.Open(time.Now()))
	}
}

// crash names the step and the write after which TestCrashing kills itself.
const crash = "SALLYPORT_TEST_CA_CRASH"

// TestCrashing does nothing unless TestKilledBetweenAnyTwoSteps starts it.
func TestCrashing(t *testing.T) {
	dir, what, _ := strings.Cut(os.Getenv(crash), "|")
	step, at, _ := strings.Cut(what, "|")
	if dir == "" {
		return
	}
	left := must1(strconv.Atoi(at))
	armed := false
	write := func(path string, data []byte, perm fs.FileMode) error {
		if armed && left == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		left--
		return daemon.WriteFile(path, data, perm)
	}
	c, err := openWith(t.Context(), Config{TrustDomain: td, Dir: dir, Audit: new(records)}, write)
	if err != nil {
		t.Fatal(err)
	}
	armed, left = true, must1(strconv.Atoi(at))
	if err := takeStep(c, step); err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // before anybody is told
}

func takeStep(c *CA, step string) (err error) {
	switch step {
	case "rollback":
		_, err = c.Rollback(context.Background())
	case "emergency":
		_, err = c.Emergency(context.Background())
	default:
		_, err = c.Rotate(context.Background(), ByHand, true)
	}
	return err
}

// TestKilledBetweenAnyTwoSteps takes each step in a process that is killed
// before its first write, its second and so on: whatever is then on disk is the
// state before or after the step, signs, and goes on.
func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	if os.Getenv(crash) != "" {
		return
	}
	kills := 0
	for _, tt := range []struct {
		step   string
		from   Phase
		writes int // of files
	}{
		{"prepare", Steady, 4}, {"activate", Prepared, 3}, {"taint", Activated, 1}, {"revoke", Tainted, 1},
		{"rollback", Prepared, 1}, {"rollback", Activated, 3}, {"emergency", Steady, 6},
	} {
		for n := range tt.writes + 1 {
			cfg := config(t)
			c := open(t, cfg)
			for c.Rotation().Phase != tt.from {
				rotateNow(t, c, true)
			}
			trusted, before := c.Bundle().X509, c.Rotation()
			c.Close()
			cmd := exec.Command(os.Args[0], "-test.run=^TestCrashing$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", crash, cfg.Dir, tt.step, n))
			out, err := cmd.CombinedOutput()
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("%s: write %d: %v\n%s", tt.step, n, err, out)
			}
			kills++
			c, err = Open(t.Context(), cfg)
			if err != nil {
				t.Fatalf("%s, killed before write %d: %v", tt.step, n, err)
			}
			now := c.Rotation()
			if stayed := now.Phase == before.Phase && len(now.Roots) == len(before.Roots); stayed != (n < tt.writes) {
				t.Errorf("%s, killed before write %d of %d: phase %s", tt.step, n, tt.writes, now.Phase)
			}
			if chain := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}); now.Phase != Tainted || !now.Emergency {
				if tt.step != "revoke" {
					verify(t, chain, append(trusted, c.Bundle().X509...))
				}
			}
			certs := must1(filepath.Glob(filepath.Join(cfg.Dir, "*.crt")))
			if want := len(c.state.certificates()); len(certs) != want {
				t.Errorf("%s, killed before write %d: %d certificates on disk, the state names %d", tt.step, n, len(certs), want)
			}
			if n < tt.writes {
				if err := takeStep(c, tt.step); err != nil {
					t.Errorf("%s again: %v", tt.step, err)
				}
			}
			c.Close()
		}
	}
	t.Logf("killed %d times", kills)
}

func TestRootThatExpiredWhileDownIsReplacedByHand(t *testing.T) {
	cfg := config(t)
	c := open(t, cfg)
	root := c.Bundle().X509[0]
	c.Close()
	if _, err := Replace(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "the root is still good; next: start the issuer") {
		t.Errorf("a good root: %v", err)
	}
	cfg.Now = func() time.Time { return time.Now().Add(400 * 24 * time.Hour) }
	_, err := Open(t.Context(), cfg)
	if !errors.Is(err, ErrRootExpired) || !strings.Contains(err.Error(), "; next: check the clock; if it is right, stop the issuer and run: issuer ca rotate --emergency") {
		t.Errorf("got %v", err)
	}
	c, err = Replace(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	phase(t, c, Steady, 1, 0)
	if c.Bundle().X509[0].Equal(root) || c.Bundle().Sequence < 2 {
		t.Errorf("bundle %+v", c.Bundle())
	}
	c.Close()
	c = open(t, cfg)
	verify(t, issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), c.Bundle().X509)
	if files := must1(filepath.Glob(filepath.Join(cfg.Dir, "*.crt"))); len(files) != 2 {
		t.Errorf("files %v", files)
	}
}

// TestOpenSSLVerifiesDuringRotation has openssl look at old and new chains in
// each phase, against the bundle of that phase.
func TestOpenSSLVerifiesDuringRotation(t *testing.T) {
	c := open(t, config(t))
	dir := t.TempDir()
	put := func(name string, certs ...*x509.Certificate) string {
		var b bytes.Buffer
		for _, x := range certs {
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: x.Raw})
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	meshtest.Need(t, "openssl")
	check := func(chain []*x509.Certificate, good bool) {
		t.Helper()
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", put("roots.pem", c.Bundle().X509...),
			"-untrusted", put("inter.pem", chain[1]), put("leaf.pem", chain[0])).CombinedOutput()
		if (err == nil) != good {
			t.Errorf("phase %s: %v\n%s", c.Rotation().Phase, err, out)
		}
	}
	old := issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()})
	for _, p := range []Phase{Prepared, Activated, Tainted, Steady} {
		rotateNow(t, c, true)
		check(old, p != Steady)
		check(issue(t, c, X509Request{ID: web, PublicKey: anyKey.Public()}), true)
	}
}
