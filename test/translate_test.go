package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/status"

	"sallyport/internal/meshtest"
	"sallyport/internal/translate/translatetest"
)

// roleShopper has this program call the shop with the client of grpc-go.
const roleShopper = "shopper"

// shop calls a method and prints what came of it.
func shop() int {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	out, err := translatetest.Call(ctx, os.Args[1], os.Args[2], os.Args[3])
	s := status.Convert(err)
	fmt.Printf("%s%d %s\n", out, s.Code(), s.Message())
	return 0
}

// A shopfront is payment calling billing, which is the shop.
type shopfront struct {
	*world
	pay, bill *node
	payment   *hand
	self      string
}

// openShop starts the shop, which serve does at an address, with a policy that
// lets payment call its methods Get, Watch, Find and Put and translates the way it
// says.
func openShop(t *testing.T, translate string, h2c bool, serve func(addr string)) *shopfront {
	t.Helper()
	meshtest.Need(t, "curl")
	w := newWorld(t, time.Minute)
	s := &shopfront{world: w, pay: &node{name: "payment"}, bill: &node{name: "billing"}}
	var err error
	if s.self, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(w.policy, "routes"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.put(filepath.Join(w.policy, "routes", "shop.binpb"), string(translatetest.Set))
	w.put(filepath.Join(w.policy, "routes", "billing.yaml"), "service: billing\nroutes:\n  - name: faces\n    translate: "+translate+"\n")
	file := filepath.Join(w.policy, "access.csv")
	rows, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"Get", "Watch", "Find", "Put"} {
		rows = fmt.Appendf(rows, "p, shop-%s, in, %s, %s, 8443, POST, /shop.v1.Shop/%s, -, allow\n", m, id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"), m)
	}
	// What is no method is never served, whatever a row says.
	rows = fmt.Appendf(rows, "p, admin, in, %s, %s, 8443, *, /admin/**, -, allow\n", id("/ns/shop/sa/payment"), id("/ns/shop/sa/billing"))
	w.put(file, string(rows))
	w.startIssuer()
	w.join(s.bill)
	if h2c {
		w.speaksH2C(s.bill)
	}
	w.join(s.pay)
	serve(s.bill.app)
	w.startWorkload(s.bill.name)
	s.payment = w.startNode(s.pay)
	return s
}

// rest calls with curl.
func (s *shopfront) rest(path string, more ...string) page {
	s.t.Helper()
	args := append([]string{"--noproxy", "*"}, more...)
	return read(s.t, ask[runReply](s.payment, "/run", curl(append(args, "http://"+s.pay.billing+path)...)))
}

// call calls with grpc-go. The last line is the status.
func (s *shopfront) call(method, in string) string {
	s.t.Helper()
	r := ask[runReply](s.payment, "/run", []string{"env", envRole + "=" + roleShopper, s.self, s.pay.billing, method, in})
	return r.Output
}

// audited waits until billing has decided on a method.
func (s *shopfront) audited(decision, path string) {
	s.t.Helper()
	s.awaitAudit("billing", decision+" of "+path, func(l auditLine) bool {
		return l.Decision == decision && l.Verb == "POST" && l.Path == path && l.Src == id("/ns/shop/sa/payment")
	})
}

func TestTranslate(t *testing.T) {
	t.Parallel()
	t.Run("a service that speaks gRPC", func(t *testing.T) {
		t.Parallel()
		s := openShop(t, "{to: grpc, reflection: true}", true, func(addr string) { translatetest.GRPC(t, addr) })
		s.payment.await("reach the shop", func() bool { return strings.HasSuffix(s.call("Get", `{"id":"a"}`), "0 \n") })
		s.facesOfGRPC(t)
		s.isStrict(t)
	})
	t.Run("a service that speaks REST", func(t *testing.T) {
		t.Parallel()
		s := openShop(t, "{to: rest, descriptors: shop.binpb}", false, func(addr string) {
			srv := &http.Server{Addr: addr, Handler: translatetest.REST()}
			go func() { _ = srv.ListenAndServe() }()
			t.Cleanup(func() { srv.Close() })
		})
		s.payment.await("reach the shop", func() bool { return strings.HasSuffix(s.call("Get", `{"id":"a"}`), "0 \n") })
		s.facesOfREST(t)
	})
}

func (s *shopfront) facesOfGRPC(t *testing.T) {
	for _, c := range []struct{ name, method, in, want string }{
		{"one message", "Get", `{"id":"a"}`, `{"id":"a"}` + "\n0 \n"},
		{"a stream", "Watch", `{"id":"a","count":2}`, `{"id":"a"}` + "\n" + `{"id":"a","price":"1"}` + "\n0 \n"},
		{"an error", "Get", `{"id":"missing"}`, "5 no such item: 100%\n"},
		{"a method that no row allows", "Plain", `{"id":"a"}`, "7 denied by policy\n"},
	} {
		t.Run("gRPC, "+c.name, func(t *testing.T) {
			if got := s.call(c.method, c.in); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	for _, c := range []struct {
		name, path string
		args       []string
		status     string
		want       []string
	}{
		{"a path", "/v1/items/a?count=3", nil, "200", []string{`"id":"a"`, `"price":"0"`}},
		{"a body", "/v1/items", []string{"--json", `{"id":"z","price":7}`}, "200", []string{`"price":"7"`}},
		{"who calls", "/v1/items/note", []string{"-H", "x-user: alice", "-H", "sallyport-method: /shop.v1.Shop/Put"}, "200", []string{"user=[alice]", "judged=[]"}},
		{"an error", "/v1/items/missing", nil, "404", []string{`"code":5`, "no such item: 100%"}},
		{"a detail", "/v1/items/locked", nil, "400", []string{`"code":9`, `"reason":"LOCKED"`}},
		{"lines", "/v1/items/a:watch?count=2", nil, "200", []string{`"price":"0"`, `"price":"1"`}},
		{"events", "/v1/items/a:watch?count=2", []string{"-H", "accept: text/event-stream"}, "200", []string{"data: {", "\n\ndata: {"}},
		{"time", "/v1/items/hang", []string{"-H", "x-server-timeout: 0.1"}, "504", []string{`"code":4`}},
		{"an unknown field", "/v1/items", []string{"--json", `{"bogus":1}`}, "400", []string{`"code":3`, "bogus"}},
		{"an unknown parameter", "/v1/items/a?bogus=1", nil, "400", []string{`"code":3`, "bogus"}},
		{"a method that no row allows", "/shop.v1.Shop/Plain", []string{"--json", `{"id":"a"}`}, "403", []string{`"code":7`, "denied by policy", `"decision"`}},
		{"what no row allows, and is no method", "/v2/items", nil, "403", []string{`"code":7`}},
		{"what a row allows, and is no method", "/admin/drop", nil, "404", []string{`"code":12`, "no such method"}},
	} {
		t.Run("REST, "+c.name, func(t *testing.T) {
			p := s.rest(c.path, c.args...)
			body := strings.ReplaceAll(p.body, `": `, `":`)
			if p.status != c.status {
				t.Errorf("status %s, want %s: %s", p.status, c.status, p.body)
			}
			for _, want := range c.want {
				if !strings.Contains(body, want) {
					t.Errorf("%q is not in %s", want, body)
				}
			}
		})
	}
	s.audited("deny", "/shop.v1.Shop/Plain")
	s.audited("allow", "/shop.v1.Shop/Put")
	s.audited("allow", translatetest.Get)
}

// isStrict looks at what is not passed on.
func (s *shopfront) isStrict(t *testing.T) {
	large := s.path("large.json")
	s.put(large, `{"note":"`+strings.Repeat("x", 5<<20)+`"}`)
	if p := s.rest("/v1/items", "-H", "content-type: application/json", "-H", "expect:", "--data-binary", "@"+large); p.status != "413" {
		t.Errorf("a message of 5 MiB: %+v", p)
	}
	frame := s.path("get.grpc")
	s.put(frame, "\x00\x00\x00\x00\x03\n\x01a")
	web := func(method string) string {
		return ask[runReply](s.payment, "/run", curl("--noproxy", "*", "-H", "content-type: application/grpc-web+proto", "--data-binary", "@"+frame, "http://"+s.pay.billing+"/shop.v1.Shop/"+method)).Output
	}
	if got := web("Get"); !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(got, "\x00\x00\x00\x00\x03\n\x01a") || !strings.Contains(got, "Grpc-Status: 0\r\n") {
		t.Errorf("gRPC-Web: %q", got)
	}
	if got := web("Plain"); !strings.HasPrefix(got, "HTTP/1.1 403") || !strings.Contains(strings.ToLower(got), "grpc-status: 7\r\n") {
		t.Errorf("gRPC-Web that no row allows: %q", got)
	}
	if got := web("Drop"); !strings.HasPrefix(got, "HTTP/1.1 403") {
		t.Errorf("gRPC-Web of no method: %q", got)
	}
}

func (s *shopfront) facesOfREST(t *testing.T) {
	for _, c := range []struct{ name, method, in, want string }{
		{"a path and a query", "Get", `{"id":"a","count":3}`, `{"id":"a","note":"GET/v1/items/a?count=3user=timeout="}` + "\n0 \n"},
		{"a body", "Put", `{"id":"z","price":"7"}`, `{"id":"z","price":"7"}` + "\n0 \n"},
		{"an error", "Get", `{"id":"404"}`, "5 said with 404\n"},
		{"an error of Google's form", "Get", `{"id":"google"}`, "9 locked\n"},
		{"another path", "Get", `{"id":"../../admin"}`, "3 a field that stands in the path has a value that no path can have\n"},
		{"a stream", "Watch", `{"id":"a"}`, "12 the method streams, and the service speaks REST\n"},
		{"a method that no row allows", "Plain", `{"id":"a"}`, "7 denied by policy\n"},
	} {
		t.Run("gRPC, "+c.name, func(t *testing.T) {
			got := s.call(c.method, c.in)
			if got = strings.Replace(got, "timeout=29.", "timeout=", 1); c.name == "a path and a query" {
				before, _, _ := strings.Cut(got, "timeout=")
				got = before + "timeout=\"}\n0 \n" // how long it waits is the client's to say
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	p := s.rest("/v1/items/a")
	var item struct{ ID string }
	if json.Unmarshal([]byte(p.body), &item) != nil || p.status != "200" || item.ID != "a" {
		t.Errorf("REST itself: %+v", p)
	}
	if p := s.rest("/shop.v1.Shop/Plain", "--json", `{}`); p.status != "403" {
		t.Errorf("REST of a method that no row allows: %+v", p)
	}
	s.audited("deny", "/shop.v1.Shop/Plain")
	s.audited("allow", translatetest.Get)
}
