package review

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// Who can reach a destination, and what an identity can reach, is exactly what
// the judge allows.
func TestReachAgreesWithTheJudge(t *testing.T) {
	calls := universe()
	r := rand.New(rand.NewPCG(7, 7))
	allowed := 0
	for range 150 {
		p := randomRules(r)
		judge, err := judgeOf(p)
		if err != nil {
			t.Fatal(err)
		}
		who, what := map[string][]Reach{}, map[string][]Reach{}
		for i := range calls {
			c := &calls[i]
			if _, done := who[c.Dst]; !done {
				if who[c.Dst], err = WhoCan(p, c.Dir, c.Dst, moment); err != nil {
					t.Fatal(err)
				}
			}
			src := c.Src.String()
			if _, done := what[src]; !done {
				if what[src], err = CanReach(p, c.Src, moment); err != nil {
					t.Fatal(err)
				}
			}
			want := judge.Decide(c).Allow
			if want {
				allowed++
			}
			for name, rs := range map[string][]Reach{"who can reach": who[c.Dst], "what can be reached": what[src]} {
				n := 0
				for j := range rs {
					if rs[j].Covers(c) {
						n++
					}
				}
				if n > 1 || (n == 1) != want {
					t.Fatalf("%s: %d cells cover %+v, allowed is %v\nrows %+v", name, n, c, want, p.Rules)
				}
			}
		}
	}
	t.Logf("%d calls of 150 policies allowed", allowed)
	if allowed < 1000 {
		t.Errorf("only %d calls were allowed, which shows little", allowed)
	}
}

func TestReachNamesWhoItKnows(t *testing.T) {
	p := demo(t)
	got, err := WhoCan(p, mesh.In, "spiffe://demo.sallyport/ns/shop/sa/billing", now)
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, r := range got {
		text = append(text, r.Calls()+" by "+strings.Join(r.Known, " "))
	}
	want := []string{
		"in spiffe://demo.sallyport/ns/shop/sa/batch -> spiffe://demo.sallyport/ns/shop/sa/billing port 8443 GET /v1/report by spiffe://demo.sallyport/ns/shop/sa/batch",
		"in spiffe://demo.sallyport/ns/shop/sa/payment -> spiffe://demo.sallyport/ns/shop/sa/billing port 8443 GET|POST /v1/charges/** by spiffe://demo.sallyport/ns/shop/sa/payment",
	}
	if d := cmp.Diff(want, text); d != "" {
		t.Error(d)
	}
}

// A witness can be given back as a request.
func TestWitnessIsARequest(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	seen := 0
	for range 300 {
		old, new := randomRules(r), randomRules(r)
		cells, err := Diff(old, new, moment)
		if err != nil {
			t.Fatal(err)
		}
		for i := range cells {
			w := &cells[i].Witness
			got, err := ParseRequest(new, w.String(), moment)
			if err != nil {
				t.Fatalf("%s: %v", w, err)
			}
			if d := cmp.Diff(&w.call, got, cmpopts.IgnoreUnexported(authz.Token{}), cmpopts.EquateComparable(spiffeid.ID{}), cmpopts.EquateApproxTime(0)); d != "" {
				t.Fatalf("%s: %s", w, d)
			}
			seen++
		}
	}
	if seen < 500 {
		t.Errorf("only %d witnesses", seen)
	}
}

func TestParseRequest(t *testing.T) {
	p := demo(t)
	web := spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/web")
	pay := "spiffe://demo.sallyport/ns/shop/sa/payment"
	for _, tt := range []struct {
		text string
		want authz.Call
	}{
		{"web -> payment POST /v1/pay", authz.Call{Dir: mesh.In, Src: web, Dst: pay, Port: 8443, Verb: "POST", Path: "/v1/pay"}},
		{"in  web -> " + pay + ":9 GET / env=prod", authz.Call{Dir: mesh.In, Src: web, Dst: pay, Port: 9, Verb: "GET", Path: "/", Environment: "prod"}},
		{"web -> host:a.test", authz.Call{Dir: mesh.Out, Src: web, Dst: "host:a.test", Port: 443, Verb: "CONNECT", Path: "-"}},
		{"web -> host:a.test:8080 sni=a.test", authz.Call{Dir: mesh.Out, Src: web, Dst: "host:a.test", Port: 8080, Verb: "CONNECT", Path: "-", SNI: "a.test"}},
		{"web -> payment GET / token(iss=i scope~s claim.k=v(1) acr>=2 bound aud=x)", authz.Call{Dir: mesh.In, Src: web, Dst: pay, Port: 8443, Verb: "GET", Path: "/",
			Token: &authz.Token{Issuer: "i", Audience: []string{"x"}, Scopes: map[string]bool{"s": true}, Claims: map[string]string{"k": "v(1)"}, ACR: 2, Bound: true}}},
	} {
		got, err := ParseRequest(p, tt.text, now)
		if err != nil {
			t.Errorf("%s: %v", tt.text, err)
			continue
		}
		tt.want.Now = now
		if d := cmp.Diff(&tt.want, got, cmpopts.IgnoreUnexported(authz.Token{}), cmpopts.EquateComparable(spiffeid.ID{})); d != "" {
			t.Errorf("%s: %s", tt.text, d)
		}
	}
	for text, want := range map[string]string{
		"":                               "a request is written FROM -> TO",
		"web payment GET /":              "a request is written FROM -> TO",
		"weeb -> payment GET /":          `"weeb" is neither a SPIFFE ID nor a service`,
		"web -> paymnt GET /":            `did you mean "payment"?`,
		"web -> payment":                 "verb and path are missing",
		"web -> payment GET / when=now":  `"when=now" does not belong to a request`,
		"web -> payment GET / at noon":   `"noon" is not a time`,
		"web -> payment GET / token(":    "not closed",
		"web -> payment GET / token(x)":  "token: ",
		"web -> spiffe://a.test/x GET /": "write its port",
	} {
		if _, err := ParseRequest(p, text, now); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v, want %q", text, err, want)
		}
	}
}
