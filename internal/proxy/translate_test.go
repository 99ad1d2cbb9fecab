package proxy

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/translate"
	"sallyport/internal/translate/translatetest"
)

// shopCSV lets web call one method, and what is none.
const shopCSV = "p, get, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, POST, /shop.v1.Shop/Get, -, allow\n" +
	"p, admin, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/billing, 8443, *, /admin/**, -, allow\n"

// translated has billing be the shop, which speaks gRPC.
func translated(t *testing.T, app string, spec mesh.Translate) func(*rig) {
	return func(r *rig) {
		tr, err := translate.New(translate.Config{Log: slog.New(slog.NewTextHandler(r.log, nil)), Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", app)
		}})
		if err != nil {
			t.Fatal(err)
		}
		offer, err := tr.Read(&spec)
		if err != nil {
			t.Fatal(err)
		}
		tr.Use(offer)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- tr.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		r.inCfg.Translate, r.access = tr, shopCSV
	}
}

// Whatever face a call has, it is judged, limited and recorded as its method.
func TestACallIsWhatItMeans(t *testing.T) {
	app := translatetest.GRPC(t, "127.0.0.1:0")
	r := newRig(t, app, translated(t, app, mesh.Translate{To: "grpc", Set: translatetest.Set}), func(r *rig) {
		r.inCfg.Rates = []mesh.CallRate{{Path: translatetest.Get, Rate: mesh.Rate{Calls: 1, Per: time.Hour}, Burst: 2}}
	})
	w := r.dialIn(r.web)
	web := "POST " + translatetest.Get + " HTTP/1.1\r\nHost: b\r\nContent-Type: application/grpc-web\r\nContent-Length: 8\r\n\r\n\x00\x00\x00\x00\x03\n\x01a"
	for _, c := range []struct {
		name, request string
		status        int
		body          []string
		verb, path    string
		decision      string
	}{
		{"REST", "GET /v1/items/a HTTP/1.1\r\nHost: b\r\n\r\n", 200, []string{`"id":"a"`}, "POST", translatetest.Get, "allow"},
		{"gRPC-Web", web, 200, nil, "", "", ""},
		{"the third of two", "GET /v1/items/a HTTP/1.1\r\nHost: b\r\n\r\n", 429, []string{`"code":8`, "too many calls"}, "POST", translatetest.Get, "deny"},
		{"the third of two in gRPC-Web", web, 429, nil, "POST", translatetest.Get, "deny"},
		{"a method that no row allows", "GET /v1/items/a:watch HTTP/1.1\r\nHost: b\r\n\r\n", 403, []string{`"code":7`, `"decision":"`}, "POST", "/shop.v1.Shop/Watch", "deny"},
		{"no method", "GET /v2/items HTTP/1.1\r\nHost: b\r\n\r\n", 403, []string{`"code":7`}, "GET", "/v2/items", "deny"},
		{"no method, which a row allows", "GET /admin/drop HTTP/1.1\r\nHost: b\r\n\r\n", 404, []string{`"code":12`}, "GET", "/admin/drop", "allow"},
		{"no form of gRPC", "POST " + translatetest.Get + " HTTP/1.1\r\nHost: b\r\nContent-Type: application/grpc+thrift\r\nContent-Length: 0\r\n\r\n", 415, nil, "", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(decisions(r.inAudit))
			w.say(c.request)
			resp, body := w.answer("GET")
			if resp.StatusCode != c.status || !has(body, c.body...) {
				t.Errorf("%d %s, want %d with %q", resp.StatusCode, body, c.status, c.body)
			}
			all := decisions(r.inAudit)[before:]
			if c.path == "" {
				return
			}
			if len(all) != 1 || all[0].Verb != c.verb || all[0].Path != c.path || string(all[0].Decision) != c.decision {
				t.Errorf("recorded as %+v, want %s %s %s", all, c.decision, c.verb, c.path)
			}
		})
	}
}

// While nobody knows what there is, nothing is served, in whatever form.
func TestNothingIsServedOfAServiceThatDoesNotTell(t *testing.T) {
	r := newRig(t, "127.0.0.1:1", translated(t, "127.0.0.1:1", mesh.Translate{To: "grpc", Reflection: true}))
	w := r.dialIn(r.web)
	for _, request := range []string{
		"GET /v1/items/a HTTP/1.1\r\nHost: b\r\n\r\n",
		"POST " + translatetest.Get + " HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
	} {
		w.say(request)
		if resp, body := w.answer("GET"); resp.StatusCode != 503 || !has(body, `"code":14`) {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
}
