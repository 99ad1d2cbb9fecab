package keyset

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

const name = "https://ci.example"

var quiet = slog.New(slog.DiscardHandler)

// jwk is a public key as an issuer publishes it.
func jwk(t testing.TB, kid string) string {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	e := base64.RawURLEncoding.EncodeToString
	return fmt.Sprintf(`{"kty":"EC","crv":"P-256","kid":%q,"x":%q,"y":%q}`, kid, e(b[1:33]), e(b[33:]))
}

func keys(list ...string) string { return `{"keys":[` + strings.Join(list, ",") + `]}` }

func named(kid string) *jose.Token { return &jose.Token{Alg: "ES256", KeyID: kid} }

// An issuer is a page that says what it is told to say.
type issuer struct {
	mu     sync.Mutex
	answer func(w http.ResponseWriter, r *http.Request)
	asked  atomic.Int64
}

func (i *issuer) say(f func(w http.ResponseWriter, r *http.Request)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer = f
}

func (i *issuer) text(s string) {
	i.say(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s) })
}

func (i *issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.asked.Add(1)
	i.mu.Lock()
	f := i.answer
	i.mu.Unlock()
	f(w, r)
}

// serve starts the page on loopback and says where it is.
func serve(t *testing.T) (*issuer, mesh.KeySet) {
	t.Helper()
	is := &issuer{}
	srv := httptest.NewUnstartedServer(is)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	return is, mesh.KeySet{URL: srv.URL + "/jwks", CA: string(ca)}
}

func keeper(t *testing.T, dir string, src mesh.KeySet) *Keeper {
	t.Helper()
	k, err := New(Config{Dir: dir, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Use([]mesh.TokenIssuer{{Issuer: name, Profile: mesh.ProfileJWT, Keys: src}}); err != nil {
		t.Fatal(err)
	}
	return k
}

func find(t *testing.T, k *Keeper, kid string, want error) {
	t.Helper()
	_, known, err := k.Find(t.Context(), name, named(kid))
	if err == nil && !known {
		err = errUnknown
	}
	if !errors.Is(err, want) {
		t.Errorf("key %q: %v, want %v", kid, err, want)
	}
}

func TestKeysAreFetchedOnceAndKept(t *testing.T) {
	is, src := serve(t)
	is.text(keys(jwk(t, "a")))
	dir := filepath.Join(t.TempDir(), "keys")
	k := keeper(t, dir, src)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { find(t, k, "a", nil) })
	}
	all.Wait()
	if n := is.asked.Load(); n != 1 {
		t.Errorf("the issuer was asked %d times by 20 at once", n)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("kept %q, %v", files, err)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("kept with mode %v, %v", st.Mode(), err)
	}
	// After a restart with the issuer down, the kept keys count.
	is.say(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "down", 500) })
	again := keeper(t, dir, src)
	find(t, again, "a", nil)
	// Another page has its own keys.
	other := src
	other.URL += "2"
	find(t, keeper(t, dir, other), "a", ErrUnavailable)
	// A damaged file counts for nothing.
	if err := os.WriteFile(files[0], []byte(`{"url":"x"`), 0o600); err != nil {
		t.Fatal(err)
	}
	find(t, keeper(t, dir, src), "a", ErrUnavailable)
}

func TestNoKeyWasEverSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, up := 0, false
		doc := keys(jwk(t, "a"))
		k, _ := stubbed(t, "", func(*http.Request) (int, string) {
			if asked++; up {
				return http.StatusOK, doc
			}
			return http.StatusServiceUnavailable, "down"
		})
		// It is asked again after a second, two, four and so on.
		for want := 1; want <= 4; want++ {
			for range 5 {
				find(t, k, "a", ErrUnavailable)
			}
			if asked != want {
				t.Errorf("an issuer that is down was asked %d times, want %d", asked, want)
			}
			time.Sleep(firstAgain << (want - 1))
		}
		if g := k.Generation(name); g != 0 {
			t.Errorf("generation %d without keys", g)
		}
		if _, _, err := k.Find(t.Context(), "https://other.example", named("a")); !errors.Is(err, ErrUnavailable) {
			t.Errorf("an issuer that nobody named: %v", err)
		}
		up = true
		find(t, k, "a", nil)
	})
}

func TestUnusableAnswersDoNotReplaceKeys(t *testing.T) {
	good := keys(jwk(t, "a"))
	for what, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"an error page": func(w http.ResponseWriter, r *http.Request) { http.Error(w, good, 500) },
		"no JSON":       func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") },
		"no keys":       func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, keys()) },
		"a secret": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, keys(jwk(t, "b"), `{"kty":"oct","k":"AAAA"}`))
		},
		"too long": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, good+strings.Repeat(" ", maxDocument)) },
		"another host": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.2:1/", http.StatusFound)
		},
		"clear text": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+r.Host+"/", http.StatusFound)
		},
		"round and round": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) },
	} {
		t.Run(what, func(t *testing.T) {
			is, src := serve(t)
			is.text(good)
			k := keeper(t, "", src)
			find(t, k, "a", nil)
			was := k.Generation(name)
			is.say(answer)
			s := (*k.sets.Load())[name]
			if err := s.read(t.Context(), time.Now()); err == nil {
				t.Error("it was taken for a key set")
			}
			find(t, k, "a", nil)
			if k.Generation(name) != was {
				t.Error("the keys count as changed")
			}
			if what == "another host" || what == "clear text" {
				return
			}
			fresh := keeper(t, "", src)
			find(t, fresh, "a", ErrUnavailable)
		})
	}
}

func TestRedirectOnOneHostIsFollowed(t *testing.T) {
	is, src := serve(t)
	good := keys(jwk(t, "a"))
	is.say(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/jwks" {
			http.Redirect(w, r, "/v2", http.StatusFound)
			return
		}
		io.WriteString(w, good)
	})
	find(t, keeper(t, "", src), "a", nil)
}

func TestUnchangedKeysAreConfirmed(t *testing.T) {
	is, src := serve(t)
	good := keys(jwk(t, "a"))
	is.say(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("If-None-Match") == `"1"` {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		w.Header().Set("ETag", `"1"`)
		w.Header().Set("Cache-Control", "public, max-age=3600")
		io.WriteString(w, good)
	})
	k := keeper(t, "", src)
	find(t, k, "a", nil)
	was, s := k.Generation(name), (*k.sets.Load())[name]
	if wait := time.Until(s.cur.Load().next); wait < 29*time.Minute || wait > 48*time.Minute {
		t.Errorf("asks again in %s, want half to four fifths of an hour", wait)
	}
	if err := s.read(t.Context(), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	find(t, k, "a", nil)
	if k.Generation(name) != was || s.cur.Load().got.Before(time.Now().Add(time.Minute)) {
		t.Error("keys that were confirmed count as changed or as old")
	}
}

func TestAgeOfAnAnswer(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"": defaultAge, "no-store": defaultAge, "max-age=1": minAge, "max-age=999999999": maxAge,
		"public, Max-Age=7200": 2 * time.Hour, "max-age=-1": defaultAge, "max-age=x": defaultAge,
	} {
		if got := maxAgeOf(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

// A stub issuer without a network, for tests with their own time.
func stubbed(t *testing.T, dir string, say func(r *http.Request) (int, string)) (*Keeper, *set) {
	t.Helper()
	k := keeper(t, dir, mesh.KeySet{URL: "https://ci.example/jwks"})
	s := (*k.sets.Load())[name]
	s.page.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
		code, body := say(r)
		if code == 0 {
			return nil, errors.New("no route to host")
		}
		return &http.Response{StatusCode: code, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	})
	return k, s
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestUnknownKeyIDsAskOncePerHalfMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		doc := keys(jwk(t, "a"))
		k, _ := stubbed(t, "", func(*http.Request) (int, string) { asked.Add(1); return 200, doc })
		find(t, k, "a", nil)
		for i := range 2000 {
			find(t, k, fmt.Sprint("guess", i), errUnknown)
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("guesses asked %d times", n-1)
		}
		time.Sleep(askEvery)
		for i := range 2000 {
			find(t, k, fmt.Sprint("guess", i), errUnknown)
		}
		if n := asked.Load(); n != 2 {
			t.Errorf("guesses after half a minute asked %d times, want once", n-1)
		}
		// A new key is found by the next question that may be asked.
		doc = keys(jwk(t, "a"), jwk(t, "b"))
		find(t, k, "b", errUnknown)
		time.Sleep(askEvery)
		find(t, k, "b", nil)
		// One key ID does not ask again for a minute, others may.
		find(t, k, "c", errUnknown)
		time.Sleep(askEvery)
		find(t, k, "c", errUnknown)
		n := asked.Load()
		time.Sleep(askEvery)
		find(t, k, "c", errUnknown)
		if got := asked.Load(); got != n {
			t.Errorf("an unknown key ID asked again within a minute")
		}
	})
}

func TestUnknownIsBounded(t *testing.T) {
	s := &set{unknown: map[string]time.Time{}}
	for i := range 3 * maxUnknown {
		s.rememberUnknown(fmt.Sprint(i), time.Now())
	}
	if len(s.unknown) > maxUnknown {
		t.Errorf("%d are kept", len(s.unknown))
	}
}

func TestOldKeysServeForADayAndNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		doc := keys(jwk(t, "a"))
		k, _ := stubbed(t, "", func(*http.Request) (int, string) {
			if down.Load() {
				return 0, ""
			}
			return 200, doc
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		find(t, k, "a", nil)
		was := k.Generation(name)
		down.Store(true)
		time.Sleep(staleAfter - time.Hour)
		find(t, k, "a", nil)
		if k.Generation(name) != was {
			t.Error("keys that are stale count as changed")
		}
		time.Sleep(2 * time.Hour)
		find(t, k, "a", ErrUnavailable)
		if k.Generation(name) != 0 {
			t.Error("tokens that were verified by keys that ended still count")
		}
		down.Store(false)
		time.Sleep(askEvery + time.Second)
		find(t, k, "a", nil)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunRefreshes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		var doc atomic.Value
		doc.Store(keys(jwk(t, "a")))
		k, _ := stubbed(t, "", func(*http.Request) (int, string) { asked.Add(1); return 200, doc.Load().(string) })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		if asked.Load() != 1 {
			t.Fatalf("asked %d times at the start", asked.Load())
		}
		was := k.Generation(name)
		doc.Store(keys(jwk(t, "b")))
		time.Sleep(8*time.Minute + time.Second)
		find(t, k, "b", nil)
		if k.Generation(name) == was {
			t.Error("new keys do not count as changed")
		}
		// An issuer that is no longer in the policy is not asked any more.
		if err := k.Use(nil); err != nil {
			t.Fatal(err)
		}
		n := asked.Load()
		time.Sleep(time.Hour)
		if got := asked.Load(); got != n {
			t.Errorf("asked %d times after the policy forgot it", got-n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// One issuer that hangs holds up nobody else.
func TestIssuersDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, err := New(Config{Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		page := func(n string) mesh.TokenIssuer {
			return mesh.TokenIssuer{Issuer: n, Profile: mesh.ProfileJWT, Keys: mesh.KeySet{URL: n + "/jwks"}}
		}
		if err := k.Use([]mesh.TokenIssuer{page("https://slow.example"), page(name)}); err != nil {
			t.Fatal(err)
		}
		doc := keys(jwk(t, "a"))
		for n, s := range *k.sets.Load() {
			s.page.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				if n != name {
					<-r.Context().Done()
					return nil, r.Context().Err()
				}
				return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(doc)), Request: r}, nil
			})
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		synctest.Wait()
		find(t, k, "a", nil)
		begun := time.Now()
		if _, _, err := k.Find(ctx, "https://slow.example", named("a")); !errors.Is(err, ErrUnavailable) {
			t.Errorf("the slow one: %v", err)
		}
		if took := time.Since(begun); took > fetchTimeout {
			t.Errorf("the slow one held the token for %s", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestFileIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "jwks.json")
		write := func(s string) {
			if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		k := keeper(t, "", mesh.KeySet{File: path})
		find(t, k, "a", ErrUnavailable)
		write(keys(jwk(t, "a")))
		time.Sleep(fileEvery)
		find(t, k, "a", nil)
		write(keys(jwk(t, "b")))
		time.Sleep(fileEvery)
		find(t, k, "b", nil)
		find(t, k, "a", errUnknown)
	})
}

func TestInlineKeys(t *testing.T) {
	k := keeper(t, "", mesh.KeySet{Inline: keys(jwk(t, "a"))})
	find(t, k, "a", nil)
	find(t, k, "b", errUnknown)
	bad := []mesh.TokenIssuer{{Issuer: name, Profile: mesh.ProfileJWT, Keys: mesh.KeySet{Inline: `{"keys":[]}`}}}
	if err := k.Use(bad); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("a policy with unreadable keys: %v", err)
	}
	find(t, k, "a", nil) // as before
}

func TestPagesAreNotLinkLocal(t *testing.T) {
	for _, a := range []string{"169.254.169.254:443", "[fe80::1]:443", "0.0.0.0:443", "224.0.0.1:443", "100.100.100.200:443", "[::ffff:169.254.169.254]:443"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		c, err := screened().DialContext(ctx, "tcp", a)
		cancel()
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "not where an issuer") {
			t.Errorf("%s: %v", a, err)
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := screened().DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// FuzzKept: whatever stands in a kept file, it gives keys or nothing.
func FuzzKept(f *testing.F) {
	good, err := json.Marshal(kept{URL: "https://ci.example/jwks", Got: time.Now(), Doc: json.RawMessage(keys(jwk(f, "a")))})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"url":"https://ci.example/jwks","keys":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &set{cfg: &Config{Dir: t.TempDir(), Log: quiet}, issuer: name, source: mesh.KeySet{URL: "https://ci.example/jwks"}}
		if err := os.WriteFile(s.file(), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s.load()
		if h := s.cur.Load(); h != nil && len(h.keys) == 0 {
			t.Error("keys without a key")
		}
	})
}
