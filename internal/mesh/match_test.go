package mesh

import (
	"strings"
	"testing"
	"time"
)

const (
	web     = "spiffe://demo.sallyport/ns/shop/sa/web"
	billing = "spiffe://demo.sallyport/ns/shop/sa/billing"
)

func TestMatchSegments(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"/v1/charges", "/v1/charges", true},
		{"/v1/charges", "/v1/charges/", false},
		{"/v1/charges/", "/v1/charges/", true},
		{"/v1/charges", "/v1/Charges", false},
		{"/v1/charges/**", "/v1/charges", true},
		{"/v1/charges/**", "/v1/charges/", true},
		{"/v1/charges/**", "/v1/charges/4/5", true},
		{"/v1/charges/**", "/v1/chargesX", false},
		{"/v1/*", "/v1/x", true},
		{"/v1/*", "/v1/", false},
		{"/v1/*", "/v1", false},
		{"/v1/*", "/v1/x/y", false},
		{"/*/x", "/a/x", true},
		{"/*/x", "//x", false},
		{"/v1/x*", "/v1/xy", false},
		{"/v1/x*", "/v1/x*", true},
		{"/**/x", "/a/x", false},
		{"/**/x", "/**/x", true},
		{"**", "anything/at/all", true},
		{"**", "", false},
		{"", "", false},
		{"", "/", false},
		{"/", "/", true},
		{"a/b", "a", false},
		{"a", "a/b", false},
	} {
		if got := MatchSegments(c.pattern, c.s); got != c.want {
			t.Errorf("MatchSegments(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
}

func TestMatchSrc(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{web, web, true},
		{web, billing, false},
		{"**", web, true},
		{"**", "spiffe://evil.test/x", true},
		{"**", "host:x", false},
		{"**", "", false},
		{"*", web, false},
		{"", web, false},
		{"group:ci", "group:ci", false},
		{"spiffe://demo.sallyport/**", web, true},
		{"spiffe://demo.sallyport/ns/*/sa/web", web, true},
		{"spiffe://demo.sallyport/ns/shop/**", web, true},
		{"spiffe://demo.sallyport/ns/shop/**", "spiffe://demo.sallyport/ns/shopping/sa/web", false},
		{"spiffe://*/ns/shop/sa/web", web, false},
		{"spiffe://**", web, false},
		{"spiffe://demo.sallyport/**", "spiffe://demo.sallyport.evil.test/ns", false},
		{"spiffe://demo.sallyport", web, false},
		{"spiffe://", "spiffe://", false},
	} {
		if got := MatchSrc(c.pattern, c.id); got != c.want {
			t.Errorf("MatchSrc(%q, %q) = %v", c.pattern, c.id, got)
		}
	}
}

func TestMatchDst(t *testing.T) {
	for _, c := range []struct {
		dir          Direction
		pattern, dst string
		want         bool
	}{
		{In, billing, billing, true},
		{In, "*", billing, true},
		{In, "**", billing, true},
		{In, "**", "host:api.stripe.test", false},
		{In, "host:api.stripe.test", "host:api.stripe.test", false},
		{Out, billing, billing, false},
		{Out, "**", "host:api.stripe.test", false},
		{Out, "*", "host:api.stripe.test", false},
		{Out, "host:api.stripe.test", "host:api.stripe.test", true},
		{Out, "host:api.stripe.test", "host:api.stripe.test.evil.test", false},
		{Out, "host:*.stripe.test", "host:api.stripe.test", true},
		{Out, "host:*.stripe.test", "host:a.api.stripe.test", false},
		{Out, "host:*.stripe.test", "host:stripe.test", false},
		{Out, "host:*.stripe.test", "host:.stripe.test", false},
		{Out, "host:*.stripe.test", "host:*.stripe.test", true},
		{Out, "host:", "host:", false},
		{Out, "hosts:x", "hosts:x", false},
		{Out, "", "", false},
		{"", billing, billing, false},
	} {
		if got := MatchDst(c.dir, c.pattern, c.dst); got != c.want {
			t.Errorf("MatchDst(%q, %q, %q) = %v", c.dir, c.pattern, c.dst, got)
		}
	}
}

func TestMatchVerbPortPath(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"GET", "GET", true}, {"GET", "get", false}, {"GET|POST", "POST", true},
		{"GET|POST", "GET|POST", false}, {"GET|POST", "PUT", false}, {"*", "BREW", true},
		{"*", "", false}, {"", "", false}, {"GET|", "", false}, {"POST", "POS", false},
	} {
		if got := MatchVerb(c.pattern, c.s); got != c.want {
			t.Errorf("MatchVerb(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
	for _, c := range []struct {
		pattern string
		port    uint16
		want    bool
	}{
		{"443", 443, true}, {"443", 444, false}, {"*", 1, true}, {"*", 0, false},
		{"", 0, false}, {"0", 0, false}, {"65979", 443, false}, {"-1", 65535, false},
	} {
		if got := MatchPort(c.pattern, c.port); got != c.want {
			t.Errorf("MatchPort(%q, %d) = %v", c.pattern, c.port, got)
		}
	}
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"/v1/**", "/v1/x", true}, {"**", "/x", true}, {"**", "-", true}, {"-", "-", true},
		{"-", "/", false}, {"/-", "-", false}, {"**", "", false}, {"", "-", false},
		{"**", "x", false}, {"*", "/x", false}, {"/*", "/x", true},
	} {
		if got := MatchPath(c.pattern, c.s); got != c.want {
			t.Errorf("MatchPath(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
}

func TestMatchersDoNotAllocate(t *testing.T) {
	n := testing.AllocsPerRun(100, func() {
		if !MatchSrc("spiffe://demo.sallyport/ns/*/sa/**", web) || !MatchDst(Out, "host:*.stripe.test", "host:api.stripe.test") ||
			!MatchPath("/v1/*/close", "/v1/7/close") || !MatchVerb("GET|POST", "POST") || !MatchPort("443", 443) {
			t.Error("no match")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestParseCondReadsEveryWord(t *testing.T) {
	all := "iss=https://ci.example aud=a aud=b scope~x scope~y claim.ref=refs/heads/main claim.k=v=w acr>=2 " +
		"env.name=prod env.sni=same when=Fri-Mon/08:00-24:00 until=2027-01-31T18:00:00+01:00 unless.src=spiffe://td/ns/** bound"
	conds, err := ParseCond(all)
	if err != nil {
		t.Fatal(err)
	}
	if len(conds) != len(strings.Fields(all)) {
		t.Fatalf("got %d conditions", len(conds))
	}
	byWord := map[CondWord]Cond{}
	for _, c := range conds {
		byWord[c.Word] = c
	}
	if len(byWord) != len(condWords) {
		t.Errorf("only %d of %d words", len(byWord), len(condWords))
	}
	if c := byWord[CondClaim]; c.Key != "k" || c.Value != "v=w" {
		t.Errorf("claim is %+v", c)
	}
	if c := byWord[CondACR]; c.Level != 2 || !c.NeedsToken() {
		t.Errorf("acr is %+v", c)
	}
	none, err := ParseCond("-")
	if none != nil || err != nil {
		t.Errorf("no condition gave %v, %v", none, err)
	}
	if _, err := ParseCond(""); err == nil {
		t.Error("empty condition was accepted")
	}
}

func TestCondWithin(t *testing.T) {
	one := func(s string) *Cond {
		conds, err := ParseCond(s)
		if err != nil {
			t.Fatal(err)
		}
		return &conds[0]
	}
	friMon := one("when=Fri-Mon/08:00-18:00")
	until := one("until=2027-01-31T18:00:00Z")
	for _, c := range []struct {
		cond *Cond
		at   string
		want bool
	}{
		{friMon, "2026-11-20T08:00:00Z", true},
		{friMon, "2026-11-20T07:59:59Z", false},
		{friMon, "2026-11-22T17:59:59Z", true},
		{friMon, "2026-11-22T18:00:00Z", false},
		{friMon, "2026-11-23T09:00:00+05:00", false},
		{friMon, "2026-11-24T10:00:00Z", false},
		{until, "2027-01-31T17:59:59Z", true},
		{until, "2027-01-31T18:00:00Z", false},
		{one("bound"), "2026-11-20T08:00:00Z", false},
	} {
		now, err := time.Parse(time.RFC3339, c.at)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.cond.Within(now); got != c.want {
			t.Errorf("%s%s at %s = %v", c.cond.Word, c.cond.Value, c.at, got)
		}
	}
}

func TestNearestFindsSlipsOnly(t *testing.T) {
	for _, c := range []struct{ s, want string }{
		{"alow", "allow"}, {"dney", "deny"}, {"x", ""}, {"", ""}, {"allow", "allow"},
		{"something", ""}, {strings.Repeat("a", 100), ""},
	} {
		if got := nearest(c.s, []string{"allow", "deny"}); got != c.want {
			t.Errorf("nearest(%q) = %q, want %q", c.s, got, c.want)
		}
	}
}

func TestCheckHost(t *testing.T) {
	for _, good := range []string{"a", "api.stripe.test", "xn--bcher-kva.test", "1a.test", "a.b1", strings.Repeat("a", 63) + ".test"} {
		if err := CheckHost(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", ".", "a.", ".a", "a..b", "-a.test", "a-.test", "A.test", "a_b.test", "a b.test", "é.test",
		"127.0.0.1", "127.1", "2130706433", "0x7f000001", "a.0x", "a.0xfg.0x1", "1", "a.1", "[::1]", "::1",
		"a:80", "http://a", "a/b", "*.a.test", strings.Repeat("a", 64) + ".test", strings.Repeat("a.", 127) + "test",
	} {
		if err := CheckHost(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
