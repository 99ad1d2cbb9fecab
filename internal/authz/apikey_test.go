package authz

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/mesh"
)

const testAPIKey = "slyk_0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"

// withAPIKey adds a caller with a random key.
func withAPIKey(t *mesh.Tokens) {
	t.APIKeyHeader = "x-api-key"
	t.APIKeys = append(t.APIKeys, mesh.APIKey{Name: "acme", Hashes: []string{sha256Hash([]byte(testAPIKey))}, Scopes: []string{"orders"}, Claims: map[string]string{"tier": "gold", "acr": "2"}})
}

func shows(key string) *Credential { return &Credential{APIKey: []byte(key)} }

func TestAPIKeyIsACaller(t *testing.T) {
	r := newTokenRig(t, withAPIKey)
	tok, f := r.check(shows(testAPIKey))
	if f != "" {
		t.Fatal(f)
	}
	if tok.Issuer != mesh.APIKeyIssuer || tok.Subject != "acme" || tok.Claims["sub"] != "acme" || tok.Claims["tier"] != "gold" || !tok.Scopes["orders"] || tok.Bound || tok.ACR != 2 || tok.Ours() {
		t.Errorf("got %+v", tok)
	}
	if strings.Contains(tok.detail(), testAPIKey) || tok.detail() != `API key "acme"` {
		t.Errorf("the audit says %q", tok.detail())
	}
	for _, bad := range []string{"", "short", testAPIKey + "x", strings.ToLower(testAPIKey), testAPIKey[:len(testAPIKey)-1], strings.Repeat("k", 300), "slyk_ 123456789abcdef", sha256Hash([]byte(testAPIKey))} {
		if _, f := r.check(shows(bad)); f != FaultAPIKey {
			t.Errorf("key %q: %q", bad, f)
		}
	}
	if h := r.v.APIKeyHeader(); h != "x-api-key" {
		t.Errorf("header %q", h)
	}
	// Without keys in the policy the field is nobody's business.
	r.noun.APIKeys = nil
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if tok, f := r.check(shows(testAPIKey)); tok != nil || f != "" {
		t.Errorf("got %v, %q", tok, f)
	}
}

func TestTwoLiveKeysReplaceEachOther(t *testing.T) {
	key2, hash2 := NewAPIKey()
	r := newTokenRig(t, func(n *mesh.Tokens) {
		withAPIKey(n)
		n.APIKeys[0].Hashes = append(n.APIKeys[0].Hashes, hash2)
	})
	for _, k := range []string{testAPIKey, key2} {
		if tok, f := r.check(shows(k)); f != "" || tok.Subject != "acme" {
			t.Errorf("%s: %q", k[:8], f)
		}
	}
	r.noun.APIKeys[0].Hashes = []string{hash2}
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if _, f := r.check(shows(testAPIKey)); f != FaultAPIKey {
		t.Errorf("the old key: %q", f)
	}
	if _, f := r.check(shows(key2)); f != "" {
		t.Errorf("the new key: %q", f)
	}
}

func TestAPIKeyEnds(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) { withAPIKey(n); n.APIKeys[0].NotAfter = at.Add(time.Second) })
	if _, f := r.check(shows(testAPIKey)); f != "" {
		t.Error(f)
	}
	r.now = at.Add(time.Second)
	if _, f := r.check(shows(testAPIKey)); f != FaultAPIKey {
		t.Errorf("after its end: %q", f)
	}
}

func TestAPIKeyRate(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) {
		withAPIKey(n)
		n.APIKeys[0].Rate = mesh.Rate{Calls: 5, Per: time.Second}
		n.APIKeys = append(n.APIKeys, mesh.APIKey{Name: "other", Hashes: []string{sha256Hash([]byte("another-key-of-a-caller"))}})
	})
	take := func(n int) (ok int) {
		for range n {
			switch _, f := r.check(shows(testAPIKey)); f {
			case "":
				ok++
			case FaultRate:
			default:
				t.Fatal(f)
			}
		}
		return ok
	}
	if n := take(20); n != 5 {
		t.Errorf("%d calls at once, want 5", n)
	}
	if _, f := r.check(shows("another-key-of-a-caller")); f != "" {
		t.Errorf("another caller is held up: %q", f)
	}
	r.now = r.now.Add(200 * time.Millisecond)
	if n := take(20); n != 1 {
		t.Errorf("%d calls after a fifth of a second, want 1", n)
	}
	// A change of the policy elsewhere does not give the calls back.
	r.noun.Issuers[0].Forward = true
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	if n := take(20); n != 0 {
		t.Errorf("%d calls after an edit, want 0", n)
	}
	r.now = r.now.Add(time.Minute)
	if n := take(20); n != 5 {
		t.Errorf("%d calls after a minute, want 5", n)
	}
}

func TestChosenKeysAreHashedSlowly(t *testing.T) {
	const chosen = "correct-horse-battery"
	hash, err := HashAPIKey([]byte(chosen), false)
	if err != nil || !strings.HasPrefix(hash, mesh.Argon2Prefix) {
		t.Fatal(hash, err)
	}
	r := newTokenRig(t, func(n *mesh.Tokens) {
		withAPIKey(n)
		n.APIKeys = append(n.APIKeys, mesh.APIKey{Name: "human", Hashes: []string{hash}})
	})
	for range 3 {
		if tok, f := r.check(shows(chosen)); f != "" || tok.Subject != "human" {
			t.Fatal(f)
		}
	}
	if _, f := r.check(shows("wrong-horse-battery")); f != FaultAPIKey {
		t.Errorf("a wrong key: %q", f)
	}
	// Guesses are bounded; who is known, and random keys, are not held up.
	if _, f := r.check(shows("wrong-horse-battery2")); f != FaultRate {
		t.Errorf("a guess right behind: %q", f)
	}
	for _, k := range []string{chosen, testAPIKey} {
		if _, f := r.check(shows(k)); f != "" {
			t.Errorf("%s is held up: %q", k, f)
		}
	}
	other := shows("wrong-horse-battery4")
	other.Thumbprint = thumbOf("another peer")
	if _, f := r.check(other); f != FaultAPIKey {
		t.Errorf("another peer is held up: %q", f)
	}
	r.now = r.now.Add(slowEvery)
	if _, f := r.check(shows("wrong-horse-battery3")); f != FaultAPIKey {
		t.Errorf("a guess later: %q", f)
	}
}

// Many calls with one chosen key, right after a start, cost one comparison.
func TestChosenKeyIsComparedOnce(t *testing.T) {
	const chosen = "correct-horse-battery"
	hash, err := HashAPIKey([]byte(chosen), false)
	if err != nil {
		t.Fatal(err)
	}
	r := newTokenRig(t, func(n *mesh.Tokens) {
		n.APIKeys = []mesh.APIKey{{Name: "human", Hashes: []string{hash}}}
	})
	keys := r.v.state.Load().keys
	keys.turn <- struct{}{} // nothing is compared yet
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if tok, f := r.v.Check(t.Context(), shows(chosen)); f != nil || tok.Subject != "human" {
				t.Errorf("%+v", f)
			}
		})
	}
	gone, stop := context.WithCancel(t.Context())
	stop()
	c := shows("another-horse-battery")
	c.Thumbprint = thumbOf("another peer")
	if _, f := r.v.Check(gone, c); f == nil || f.Code != FaultRate {
		t.Errorf("who went away: %+v", f)
	}
	<-keys.turn
	all.Wait()
	if len(keys.known) != 1 || len(keys.trying) != 0 {
		t.Errorf("%d known, %d are being tried", len(keys.known), len(keys.trying))
	}
}

func TestPeersThatWaitAreBounded(t *testing.T) {
	ks := &apiKeys{next: map[[32]byte]time.Time{}}
	for i := range mostKnown {
		if !ks.delay(thumbOf(fmt.Sprint(i)), at) {
			t.Fatal(i)
		}
	}
	if ks.delay(thumbOf("more"), at) {
		t.Error("one more was taken")
	}
	if !ks.delay(thumbOf("more"), at.Add(slowEvery)) || len(ks.next) != 1 {
		t.Errorf("%d wait after all had waited", len(ks.next))
	}
}

func TestAPIKeysAreSafeForConcurrentUse(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) { withAPIKey(n); n.APIKeys[0].Rate = mesh.Rate{Calls: 50, Per: time.Hour} })
	var mu sync.Mutex
	ok := 0
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				if _, f := r.v.Check(t.Context(), shows(testAPIKey)); f == nil {
					mu.Lock()
					ok++
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	if ok != 50 {
		t.Errorf("%d calls, want 50", ok)
	}
}

func TestNewAPIKeysDiffer(t *testing.T) {
	a, ha := NewAPIKey()
	b, hb := NewAPIKey()
	if a == b || ha == hb || !strings.HasPrefix(a, apiKeyPrefix) || len(a) != 48 || mesh.CheckKeyHash(ha) != nil {
		t.Errorf("%s, %s", ha, hb)
	}
	if h, err := HashAPIKey([]byte(a), true); err != nil || h != ha {
		t.Errorf("%s, %v", h, err)
	}
	for key, want := range map[string]bool{a: true, b: true, a[1:]: false, a + "A": false, apiKeyPrefix + strings.Repeat("-", 42): false, "": false} {
		if IsRandomAPIKey([]byte(key)) != want {
			t.Errorf("%q: random is %v", key, !want)
		}
	}
	for _, bad := range []string{"short", "with a blank in it", strings.Repeat("x", 257)} {
		if _, err := HashAPIKey([]byte(bad), true); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// A peer whose key takes long to compare cannot have more of them wait for it.
func TestAPeerGuessesOneKeyAtATime(t *testing.T) {
	r := newTokenRig(t, func(n *mesh.Tokens) {
		hash, err := HashAPIKey([]byte("correct-horse-battery"), false)
		if err != nil {
			t.Fatal(err)
		}
		n.APIKeys = []mesh.APIKey{{Name: "human", Hashes: []string{hash}}}
	})
	keys := r.v.state.Load().keys
	keys.turn <- struct{}{} // nothing is compared yet
	first := make(chan *Fault)
	go func() {
		_, f := r.v.Check(t.Context(), shows("wrong-horse-battery"))
		first <- f
	}()
	for waits := false; !waits; {
		keys.mu.Lock()
		waits = len(keys.trying) == 1
		keys.mu.Unlock()
		runtime.Gosched()
	}
	keys.mu.Lock()
	clear(keys.next) // as if its delay were over
	keys.mu.Unlock()
	if _, f := r.v.Check(t.Context(), shows("wrong-horse-battery2")); f == nil || f.Code != FaultRate {
		t.Errorf("a second guess: %+v", f)
	}
	<-keys.turn
	if f := <-first; f == nil || f.Code != FaultAPIKey {
		t.Errorf("the first guess: %+v", f)
	}
	if len(keys.guessing) != 0 || len(keys.next) != 1 {
		t.Errorf("%d guess, %d wait", len(keys.guessing), len(keys.next))
	}
}
