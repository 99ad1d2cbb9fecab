package proxy

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/hop"
	"sallyport/internal/http1"
	"sallyport/internal/http2"
	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

// The application is told where a call comes from in the fields it knows, once
// each, by us alone.
func TestIntroduction(t *testing.T) {
	r := newRig(t, app(t, echoHead), func(r *rig) { r.inCfg.Name = func() mesh.ServiceName { return "billing" } })
	w := r.dialIn(r.web)
	for _, host := range []string{"billing.mesh.internal", "billing.mesh.internal:8443", "billing.mesh.internal"} {
		w.say("GET /ok/1 HTTP/1.1\r\nHost: " + host + "\r\nX-Forwarded-For: 10.9.9.9\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Port: 1\r\nForwarded: for=evil\r\n\r\n")
		_, got := w.answer("GET")
		for _, line := range []string{
			"X-Forwarded-For: 127.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: " + host,
			`Forwarded: for=127.0.0.1;host="` + host + `";proto=https`, "X-Forwarded-Client-Cert: By=" + billing.String() + ";URI=" + web.String(),
		} {
			if strings.Count(got, "\n"+line+"\r\n") != 1 {
				t.Errorf("%s: want %q once in\n%s", host, line, got)
			}
		}
		if has(got, "evil") || has(got, "gopher") || has(got, "9.9.9") || has(got, "Forwarded-Port") {
			t.Errorf("%s: what the caller said came through:\n%s", host, got)
		}
	}
}

func TestIntroductionOfEachAddress(t *testing.T) {
	for remote, want := range map[string]string{
		"192.0.2.7:80":          "X-Forwarded-For: 192.0.2.7\r\n|for=192.0.2.7;",
		"[2001:db8::7]:80":      "X-Forwarded-For: 2001:db8::7\r\n|for=\"[2001:db8::7]\";",
		"[::ffff:192.0.2.7]:80": "X-Forwarded-For: 192.0.2.7\r\n|for=192.0.2.7;",
		"[fe80::1%eth0]:80":     "X-Forwarded-For: fe80::1\r\n|for=\"[fe80::1]\";",
		"@":                     "for=unknown;",
	} {
		i := introduce("self", "peer", remote, false)
		got := string(i.append(nil, []byte("a:1"), nil))
		for part := range strings.SplitSeq(want, "|") {
			if !has(got, part) {
				t.Errorf("%s: %q lacks %q", remote, got, part)
			}
		}
		if remote == "@" && has(got, "X-Forwarded-For") {
			t.Errorf("an address was made up: %q", got)
		}
	}
}

// Who is trusted with X-Forwarded-For adds to it at the end: what counts is what
// stands behind the last thing that is no address.
func TestForwardedForOfTheTrusted(t *testing.T) {
	many := strings.TrimSuffix(strings.Repeat("10.0.0.1, ", maxForwarded+1), ", ")
	for _, c := range []struct {
		lines     []string
		xff, fors string
	}{
		{nil, "192.0.2.7", "for=192.0.2.7"},
		{[]string{""}, "192.0.2.7", "for=192.0.2.7"},
		{[]string{"203.0.113.5"}, "203.0.113.5, 192.0.2.7", "for=203.0.113.5, for=192.0.2.7"},
		{[]string{"203.0.113.5,198.51.100.1 ", "\t10.0.0.1"}, "203.0.113.5, 198.51.100.1, 10.0.0.1, 192.0.2.7", "for=203.0.113.5, for=198.51.100.1, for=10.0.0.1, for=192.0.2.7"},
		{[]string{"203.0.113.5:4711, [2001:db8::1]:80, [2001:db8::2], 2001:DB8::3"}, "203.0.113.5, 2001:db8::1, 2001:db8::2, 2001:db8::3, 192.0.2.7",
			`for=203.0.113.5, for="[2001:db8::1]", for="[2001:db8::2]", for="[2001:db8::3]", for=192.0.2.7`},
		{[]string{"::ffff:203.0.113.5, fe80::1%eth0;x"}, "203.0.113.5, fe80::1, 192.0.2.7", `for=203.0.113.5, for="[fe80::1]", for=192.0.2.7`},
		{[]string{"127.0.0.1, unknown, 203.0.113.5"}, "203.0.113.5, 192.0.2.7", "for=203.0.113.5, for=192.0.2.7"},
		{[]string{"127.0.0.1", "evil\"", "203.0.113.5"}, "203.0.113.5, 192.0.2.7", "for=203.0.113.5, for=192.0.2.7"},
		{[]string{"127.0.0.1,,203.0.113.5"}, "203.0.113.5, 192.0.2.7", "for=203.0.113.5, for=192.0.2.7"},
		{[]string{"203.0.113.5, "}, "192.0.2.7", "for=192.0.2.7"},
		{[]string{"203.0.113.05"}, "192.0.2.7", "for=192.0.2.7"},
		{[]string{"[203.0.113.5"}, "192.0.2.7", "for=192.0.2.7"},
		{[]string{"1.1.1.1, " + many}, strings.Repeat("10.0.0.1, ", maxForwarded) + "192.0.2.7", strings.Repeat("for=10.0.0.1, ", maxForwarded) + "for=192.0.2.7"},
	} {
		fields := []http1.Field{{Name: []byte("X_Forwarded_For"), Value: []byte("9.9.9.9")}}
		for n, v := range c.lines {
			name := []string{"X-Forwarded-For", "x-forwarded-for"}[n%2]
			fields = append(fields, http1.Field{Name: []byte(name), Value: []byte(v)}, http1.Field{Name: []byte("Forwarded"), Value: []byte("for=9.9.9.9")})
		}
		i := introduce("self", "peer", "192.0.2.7:80", true)
		for range 2 {
			got := string(i.append(nil, []byte("a:1"), fields))
			want := "X-Forwarded-Host: a:1\r\nX-Forwarded-For: " + c.xff + "\r\nForwarded: " + c.fors + ";host=\"a:1\";proto=https\r\n"
			if !strings.HasSuffix(got, "X-Forwarded-Proto: https\r\n"+want) {
				t.Errorf("%q: got\n%s", c.lines, got)
			}
		}
		if got := string(introduceTo("192.0.2.7:80").append(nil, []byte("a:1"), fields)); has(got, "203.0") || has(got, "9.9.9") {
			t.Errorf("%q: believed of somebody who is not trusted:\n%s", c.lines, got)
		}
	}
	i := introduce("self", "peer", "@", true)
	got := string(i.append(nil, []byte("a"), []http1.Field{{Name: []byte("X-Forwarded-For"), Value: []byte("203.0.113.5")}}))
	if !has(got, "X-Forwarded-For: 203.0.113.5\r\nForwarded: for=203.0.113.5, for=unknown;host") {
		t.Errorf("of a connection without an address:\n%s", got)
	}
}

func introduceTo(remote string) *introduction {
	i := introduce("self", "peer", remote, false)
	return &i
}

// The addresses that a load balancer tells go through both sidecars, over every
// protocol between them, when both are told so, and else through neither.
func TestForwardedForThroughBoth(t *testing.T) {
	for _, c := range []struct {
		name  string
		keep  bool
		from  []string
		named bool
	}{
		{"both", true, []string{"spiffe://demo.sallyport/ns/shop/sa/*"}, true},
		{"the way out drops it", false, []string{web.String()}, false},
		{"nobody is believed", true, nil, false},
		{"another is believed", true, []string{billing.String(), "spiffe://demo.sallyport/ns/shop/sa/we", "spiffe://other.example/**"}, false},
	} {
		for _, proto := range []string{hop.Proto, http2.Proto, "http/1.1"} {
			r := newRig(t, app(t, echoHead), func(r *rig) {
				r.protos, r.outCfg.KeepForwardedFor, r.inCfg.ForwardedFrom = []string{proto}, c.keep, c.from
				r.inCfg.TLS = svid.ServerTLS(r.billing, func(spiffeid.ID) error { return nil }, proto)
			})
			w := r.dial()
			for range 2 {
				w.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\nX-Forwarded-For: 203.0.113.5\r\nX_Forwarded_For: 9.9.9.9\r\nForwarded: for=9.9.9.9\r\nX-Forwarded-Client-Cert: URI=evil\r\n\r\n")
				_, got := w.answer("GET")
				xff, fors := "\nX-Forwarded-For: 127.0.0.1\r\n", "\nForwarded: for=127.0.0.1;"
				if c.named {
					xff, fors = "\nX-Forwarded-For: 203.0.113.5, 127.0.0.1\r\n", "\nForwarded: for=203.0.113.5, for=127.0.0.1;"
				}
				if !has(got, xff) || !has(got, fors) || has(got, "9.9.9") || has(got, "evil") || strings.Count(strings.ToLower(got), "forwarded-for") != 1 {
					t.Errorf("%s, %s: want %q and %q in\n%s", c.name, proto, xff, fors, got)
				}
			}
		}
	}
}

func TestIntroductionDoesNotAllocate(t *testing.T) {
	i := introduce("self", "peer", "192.0.2.7:80", false)
	buf, host := make([]byte, 0, 1024), []byte("billing.mesh.internal")
	i.append(buf, host, nil)
	if n := testing.AllocsPerRun(100, func() { i.append(buf, host, nil) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A request id goes on from the caller's side to the application; what could be
// taken for something else in a log does not.
func TestRequestIDGoesOn(t *testing.T) {
	r := newRig(t, app(t, echoHead))
	const trace = "0af7651916cd43dd8448eb211c80319c"
	own := "Traceparent: 00-" + trace + "-b7ad6b7169203331-01\r\n"
	for _, c := range []struct{ name, fields, want string }{
		{"one", "X-Request-Id: 6f1c-A.b:c=+/_1\r\n", "6f1c-A.b:c=+/_1"},
		{"none", "", trace},
		{"empty", "X-Request-Id:\r\n", trace},
		{"two", "X-Request-Id: a\r\nx-request-id: b\r\n", trace},
		{"blank inside", "X-Request-Id: a b\r\n", trace},
		{"quote", "X-Request-Id: a\"b\r\n", trace},
		{"bytes of no letter", "X-Request-Id: \xc3\xa4\r\n", trace},
		{"too long", "X-Request-Id: " + strings.Repeat("a", maxRequestID+1) + "\r\n", trace},
		{"underscores", "X_Request_Id: forged\r\n", trace},
	} {
		for _, w := range []*wire{r.dial(), r.dialIn(r.web)} {
			w.say("GET /ok/1 HTTP/1.1\r\nHost: billing.mesh.internal\r\n" + own + c.fields + "\r\n")
			_, got := w.answer("GET")
			if !has(got, "X-Request-Id: "+c.want+"\r\n") || strings.Count(strings.ToLower(got), "request-id") != 1 || has(got, "forged") {
				t.Errorf("%s: got\n%s", c.name, got)
			}
		}
	}
}
