package test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestEgressCredential has the gateway add a credential that the workload never
// sees, though the host sends back what it gets.
func TestEgressCredential(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	const secret = "sk_live_0123456789abcdef"
	w := newWorld(t, time.Minute)
	got := make(chan string, 16)
	shop := w.serveOutside("shop.test", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Authorization")
		rw.Header().Set("X-Echo", r.Header.Get("Authorization"))
		_ = json.NewEncoder(rw).Encode(r.Header)
	}))
	w.extend("egress.yaml", shop.originated("shop.test")+"    inject: {secret: shop, header: Authorization, prefix: \"Bearer \", paths: [/v1/charges/**]}\n")
	w.extend("access.csv", "p, bill-shop-1, out, "+id("/ns/shop/sa/billing")+", host:shop.test, 443, GET, /v1/**, -, allow\n")
	w.startIssuer()
	file := w.path("secret")
	w.put(file, secret+"\n")
	addr := freePort(t)
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\nsecrets: [{name: shop, file: %s}]\n", addr, freePort(t), file))
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	bill := &node{name: "billing", gateways: addr}
	w.join(bill)
	billing := w.startNode(bill)
	w.awaitReach(billing, "http://shop.test/v1/other")
	for len(got) > 0 {
		<-got
	}
	for path, want := range map[string]string{"/v1/charges/7": "Bearer " + secret, "/v1/other": ""} {
		p := read(t, ask[runReply](billing, "/run", curl("-H", "Authorization: Bearer of-the-workload", "http://shop.test"+path)))
		if at := <-got; p.status != "200" || at != want {
			t.Errorf("%s: %+v, the host got %q", path, p, at)
		}
		if strings.Contains(fmt.Sprintf("%+v", p), secret) || want != "" && !strings.Contains(p.body, "***") {
			t.Errorf("%s: the workload is shown %+v", path, p)
		}
	}
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == file {
			return nil //nolint:nilerr // what is gone shows nothing
		}
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), secret) {
			t.Errorf("the credential is in %s", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
