package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
)

// TestEncodeIsThatOfTheStandardLibrary compares the bytes for every kind of key
// and for the names and dates at which the encoding changes.
func TestEncodeIsThatOfTheStandardLibrary(t *testing.T) {
	c := open(t, config(t))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]crypto.PublicKey{
		"P-256": newKey().Public(), "P-384": must1(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)).Public(),
		"Ed25519": ed.Public(), "RSA": must1(rsa.GenerateKey(rand.Reader, 2048)).Public(),
	}
	many := make([]string, maxDNSNames)
	for i := range many {
		many[i] = strings.Repeat("a", 40+i%20) + ".corp.example"
		many[i] = string(rune('a'+i%26)) + string(rune('a'+i/26)) + many[i]
	}
	for kind, key := range keys {
		for name, req := range map[string]X509Request{
			"plain":          {ID: web},
			"DNS names":      {ID: web, DNSNames: []string{"web.corp.example", "b"}},
			"many DNS names": {ID: web, DNSNames: many},
			"a long path":    {ID: spiffeid.RequireFromPath(td, "/"+strings.Repeat("x", 1900))},
		} {
			req.PublicKey = key
			d := must1(c.Prepare(req)).d
			same(t, kind+" "+name, d)
			for _, end := range []time.Time{
				time.Date(2049, 12, 31, 23, 59, 59, 5e8, time.UTC), time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC),
				time.Date(2049, 12, 31, 23, 59, 59, 0, time.FixedZone("west", -3600)), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
			} {
				d.template.NotAfter = end
				same(t, kind+" "+name+" until "+end.String(), d)
			}
			for _, serial := range []int64{1, 0x7f, 0x80, 0xff, 0x100} {
				d.template.SerialNumber = big.NewInt(serial)
				same(t, kind+" "+name+" with a serial number at a boundary", d)
			}
		}
	}
}

func same(t testing.TB, name string, d *draft) {
	t.Helper()
	got, err := d.encode()
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	if want := byStdlib(t, d).RawTBSCertificate; !bytes.Equal(got, want) {
		t.Errorf("%s:\n got %x\nwant %x", name, got, want)
	}
}

// FuzzEncode compares the bytes for whatever IDs, names and dates Prepare
// accepts.
func FuzzEncode(f *testing.F) {
	c := open(f, config(f))
	f.Add("/ns/shop/sa/web", "web.corp.example b", []byte{1, 2}, int64(2524607999))
	f.Fuzz(func(t *testing.T, path, names string, serial []byte, end int64) {
		id, err := spiffeid.FromPath(td, path)
		if err != nil {
			return
		}
		p, err := c.Prepare(X509Request{ID: id, PublicKey: anyKey.Public(), DNSNames: strings.Fields(names)})
		if err != nil {
			return
		}
		d := p.d
		if n := new(big.Int).SetBytes(serial); n.Sign() > 0 && len(serial) <= 20 {
			d.template.SerialNumber = n
		}
		if at := time.Unix(end, 0).UTC(); at.Year() >= 1950 && at.Year() <= 9999 {
			d.template.NotAfter = at
		}
		same(t, id.String(), d)
	})
}

func TestEncodeRefusesASerialNumberThatIsNotPositive(t *testing.T) {
	c := open(t, config(t))
	for _, n := range []int64{0, -1} {
		d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})).d
		d.template.SerialNumber = big.NewInt(n)
		if _, _, err := lintDraft(d); err == nil {
			t.Errorf("serial number %d was encoded", n)
		}
	}
}

// BenchmarkIssue is one X.509-SVID without its audit records, beside what
// crypto/x509 needs to create and parse a certificate.
func BenchmarkIssue(b *testing.B) {
	c := open(b, config(b))
	c.cfg.Audit = nowhere{}
	b.Run("ours", func(b *testing.B) {
		for b.Loop() {
			issue(b, c, X509Request{ID: web, PublicKey: anyKey.Public()})
		}
	})
	d := must1(c.Prepare(X509Request{ID: web, PublicKey: anyKey.Public()})).d
	key := newKey()
	issuer := *d.want.issuer
	issuer.PublicKey = key.Public()
	b.Run("crypto/x509", func(b *testing.B) {
		for b.Loop() {
			raw, err := x509.CreateCertificate(rand.Reader, d.template, &issuer, d.template.PublicKey, key)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := x509.ParseCertificate(raw); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// nowhere forgets what it is told.
type nowhere struct{}

func (nowhere) Append(*audit.Record) error { return nil }
