package keyset

import (
	"flag"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/meshtest"
)

var update = flag.Bool("update", false, "write the ledger of rules on tokens")

// A source is an issuer whose page says what a case wants.
type source struct {
	*Keeper
	t     *testing.T
	set   *set
	asked int
	down  bool
	keys  []string
}

// A keyRule is one of the rules on tokens that speak of fetching keys.
type keyRule struct {
	rule   int
	accept bool // a key counts in the end
	name   string
	run    func(s *source)
}

// keyRules are rules 10, 12 and 13, each in a time of its own.
var keyRules = []keyRule{
	{10, true, "a key ID that is new is asked for", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		s.keys = append(s.keys, "b")
		time.Sleep(askEvery)
		find(s.t, s.Keeper, "b", nil)
	}},
	{10, false, "a thousand made-up key IDs ask once", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		time.Sleep(askEvery)
		for i := range 1000 {
			find(s.t, s.Keeper, fmt.Sprint("made-up-", i), errUnknown)
		}
		if s.asked != 2 {
			s.t.Errorf("asked %d times", s.asked)
		}
	}},
	{10, false, "a key ID that was not there is not asked for within a minute", func(s *source) {
		find(s.t, s.Keeper, "b", errUnknown)
		time.Sleep(askEvery)
		find(s.t, s.Keeper, "b", errUnknown)
		was := s.asked
		time.Sleep(askEvery - time.Second)
		find(s.t, s.Keeper, "b", errUnknown)
		if s.asked != was {
			s.t.Errorf("asked %d times more", s.asked-was)
		}
	}},
	{10, false, "a new key ID while the issuer is down is no verdict, for nobody else either", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		find(s.t, s.Keeper, "gone", errUnknown) // asked a moment ago, and the issuer answered
		s.down = true
		time.Sleep(askEvery)
		was := s.asked
		for i := range 1000 {
			find(s.t, s.Keeper, fmt.Sprint("made-up-", i), ErrUnavailable)
			find(s.t, s.Keeper, "a", nil)
		}
		if s.asked != was+1 {
			s.t.Errorf("asked %d times", s.asked-was)
		}
		s.down = false
		find(s.t, s.Keeper, "made-up-1", ErrUnavailable) // not asked again yet
		time.Sleep(askEvery)
		find(s.t, s.Keeper, "made-up-1", errUnknown)
		find(s.t, s.Keeper, "made-up-2", errUnknown)
	}},
	{12, true, "keys stay while the issuer fails", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		s.down = true
		for range 23 {
			time.Sleep(time.Hour)
			_ = s.set.ask(s.t.Context(), time.Now())
			find(s.t, s.Keeper, "a", nil)
		}
	}},
	{12, false, "keys end after a day of failing", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		s.down = true
		time.Sleep(staleAfter)
		find(s.t, s.Keeper, "a", ErrUnavailable)
	}},
	{13, true, "keys stay over a restart while the issuer is down", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		s.down = true
		again, _ := stubbed(s.t, s.cfg.Dir, s.say)
		find(s.t, again, "a", nil)
	}},
	{13, false, "keys of the disk end, too", func(s *source) {
		find(s.t, s.Keeper, "a", nil)
		s.down = true
		time.Sleep(staleAfter + time.Second)
		again, _ := stubbed(s.t, s.cfg.Dir, s.say)
		find(s.t, again, "a", ErrUnavailable)
	}},
}

func (s *source) say(*http.Request) (int, string) {
	s.asked++
	if s.down {
		return 0, ""
	}
	var list []string
	for _, kid := range s.keys {
		list = append(list, jwk(s.t, kid))
	}
	return 200, keys(list...)
}

// fetchRules are rule 11, on a real page.
var fetchRules = []struct {
	name   string
	accept bool
	answer http.HandlerFunc
}{
	{"a key set over https", true, func(w http.ResponseWriter, r *http.Request) {}},
	{"a page that sends to itself", true, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/jwks" {
			http.Redirect(w, r, "/moved", http.StatusFound)
		}
	}},
	{"a page that sends elsewhere", false, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://localhost:1/", http.StatusFound)
	}},
	{"a page that sends to clear text", false, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+r.Host+"/", http.StatusFound)
	}},
	{"a quarter of a megabyte and more", false, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, strings.Repeat(" ", maxDocument))
	}},
	{"more than a hundred keys", false, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, keys(strings.Split(strings.Repeat(`{"kty":"X"} `, 101), " ")[:101]...))
	}},
	{"an error page with keys in it", false, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusTeapot) }},
}

func TestJWTRules(t *testing.T) {
	ledger := meshtest.Ledger{Path: "../authz/testdata/jwt-rules.golden", Room: "keyset"}
	for _, c := range keyRules {
		ledger.Add(c.rule, c.accept, c.name)
		t.Run(fmt.Sprintf("%02d %s", c.rule, c.name), func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			synctest.Test(t, func(t *testing.T) {
				s := &source{t: t, keys: []string{"a"}}
				s.Keeper, s.set = stubbed(t, dir, s.say)
				c.run(s)
			})
		})
	}
	for _, c := range fetchRules {
		ledger.Add(11, c.accept, c.name)
		t.Run("11 "+c.name, func(t *testing.T) {
			is, src := serve(t)
			good := keys(jwk(t, "a"))
			is.say(func(w http.ResponseWriter, r *http.Request) {
				c.answer(w, r)
				io.WriteString(w, good)
			})
			want := ErrUnavailable
			if c.accept {
				want = nil
			}
			find(t, keeper(t, "", src), "a", want)
		})
	}
	ledger.Check(t, *update)
}
