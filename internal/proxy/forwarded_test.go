package proxy

import (
	"strings"
	"testing"

	"sallyport/internal/mesh"
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
		i := introduce("self", "peer", remote)
		got := string(i.append(nil, []byte("a:1")))
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

func TestIntroductionDoesNotAllocate(t *testing.T) {
	i := introduce("self", "peer", "192.0.2.7:80")
	buf, host := make([]byte, 0, 1024), []byte("billing.mesh.internal")
	i.append(buf, host)
	if n := testing.AllocsPerRun(100, func() { i.append(buf, host) }); n != 0 {
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
