package conform

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestAConnectionIsShownOneMoment has a look that has begun go on after the
// endpoint was told to show something else: its document is still that which
// belongs to the certificate.
func TestAConnectionIsShownOneMoment(t *testing.T) {
	domain := func(name string) *Domain {
		d, err := quickDomain(spiffeid.RequireTrustDomainFromString(name))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	guest := domain("guest.example")
	l, err := openLiar("127.0.0.1:0", domain("liar.example"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	dial := func() *tls.Conn {
		c, err := tls.Dial("tcp", strings.TrimPrefix(l.url, "https://"), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	get := func(c *tls.Conn) string {
		client := &http.Client{Transport: &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
		resp, err := client.Get(l.url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if !resp.Close {
			t.Error("another look may come on the same connection")
		}
		return string(b)
	}
	first := l.next()
	before := dial()
	l.show(func(s *shown) { s.of = guest })
	second := l.next()
	after := dial()
	root := func(d *Domain) string { return b64(d.root.Raw) }
	if doc := get(before); !strings.Contains(doc, root(l.d)) || !strings.Contains(doc, first) || strings.Contains(doc, second) {
		t.Errorf("a connection of before is shown %s", doc)
	}
	if doc := get(after); !strings.Contains(doc, root(guest)) || !strings.Contains(doc, second) {
		t.Errorf("a connection of after is shown %s", doc)
	}
}
