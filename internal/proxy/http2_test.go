package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"sallyport/internal/hop"
	"sallyport/internal/svid"
)

// clientH2C is an application that says HTTP/2 to the outbound door.
func (r *rig) clientH2C() *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", r.outAddr)
	}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * patience}
}

// clientH2 is a peer of another make with an SVID.
func (r *rig) clientH2(src *svid.Source) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		d := tls.Dialer{Config: svid.ClientTLS(src, billing, "h2", "http/1.1")}
		return d.DialContext(ctx, "tcp", r.inAddr)
	}}
	tr.Protocols.SetHTTP2(true)
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * patience}
}

// withH2 has the service offer h2, as sidecars do.
func withH2(r *rig) {
	r.inCfg.TLS = svid.ServerTLS(r.billing, func(spiffeID) error { return nil }, hop.Proto, "h2", "http/1.1")
}

// Each stream is one call: judged, recorded and counted like any other, at both
// doors.
func TestCallsOverHTTP2(t *testing.T) {
	r := newRig(t, app(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL, b, r.Header.Get("X-Forwarded-Client-Cert"))
		w.Header().Set("X-Sum", "7")
	}), withH2)
	for name, c := range map[string]*http.Client{"from the application": r.clientH2C(), "from a peer": r.clientH2(r.web)} {
		scheme := map[bool]string{true: "https", false: "http"}[name == "from a peer"]
		before := len(decisions(r.inAudit))
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				resp, err := c.Post(fmt.Sprintf("%s://billing.mesh.internal/ok/%d?a=b", scheme, i), "text/plain", strings.NewReader("hello"))
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if want := fmt.Sprintf("POST /ok/%d?a=b hello ", i); err != nil || !strings.HasPrefix(string(b), want) || !strings.HasSuffix(string(b), "URI="+web.String()) {
					t.Errorf("%s: got %q, %v", name, b, err)
				}
				if resp.ProtoMajor != 2 || resp.StatusCode != 200 || resp.Trailer.Get("X-Sum") != "7" {
					t.Errorf("%s: %s %d, trailers %v", name, resp.Proto, resp.StatusCode, resp.Trailer)
				}
			})
		}
		wg.Wait()
		if n := len(decisions(r.inAudit)) - before; n != 20 {
			t.Errorf("%s: %d decisions", name, n)
		}
		resp, body := get(t, c, scheme+"://billing.mesh.internal/no")
		if resp.StatusCode != 403 || !strings.Contains(body, "denied by policy") || resp.Header.Get("Sallyport-Decision") == "" {
			t.Errorf("%s: a denied call got %d %q %v", name, resp.StatusCode, body, resp.Header)
		}
	}
}
