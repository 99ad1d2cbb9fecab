package egress

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/audit"
)

// TestCertificatesInTunnels has a host show a probe the right certificate, and
// tunnels what it likes.
func TestCertificatesInTunnels(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		for _, tt := range []struct {
			name    string
			evil    bool
			version uint16
			tickets bool
			ok      bool
		}{
			{"the same in TLS 1.2", false, tls.VersionTLS12, false, true},
			{"the same in TLS 1.2, in a session that goes on", false, tls.VersionTLS12, true, true},
			{"another in TLS 1.2", true, tls.VersionTLS12, false, false},
			{"the same in TLS 1.3", false, tls.VersionTLS13, false, true},
			{"the same in TLS 1.3, in a session that goes on", false, tls.VersionTLS13, true, true},
		} {
			t.Run(tt.name, func(t *testing.T) {
				s, other := startSite(t, "shop.test"), startSite(t, "shop.test")
				s.tls.Store(&tls.Config{MaxVersion: tt.version, SessionTicketsDisabled: !tt.tickets, NextProtos: []string{"x-tunnel"},
					GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
						if tt.evil && len(h.SupportedProtos) > 0 { // it is no probe
							return &other.certs[0], nil
						}
						return &s.certs[0], nil
					}})
				w := newWorld(t, nil)
				w.use(w.policy(probing, s.probed("shop.test")))
				cfg := &tls.Config{ServerName: "shop.test", InsecureSkipVerify: true, NextProtos: []string{"x-tunnel"}, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
				for n := range 2 {
					tun, ref := dial(w, billing, "shop.test:443")
					if ref != nil {
						t.Fatalf("refused: %+v", ref)
					}
					tc := tls.Client(netConn{t: tun}, cfg)
					err := tc.HandshakeContext(t.Context())
					if (err == nil) != tt.ok || err == nil && tc.ConnectionState().DidResume != (tt.tickets && n > 0) {
						t.Errorf("tunnel %d: %v, resumed: %v", n, err, tc.ConnectionState().DidResume)
					}
					if tt.ok { // or there is no ticket yet
						_, _ = io.WriteString(tc, "GET / HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n")
						_, _ = io.Copy(io.Discard, tc)
					}
					tun.Close()
				}
				if !tt.ok {
					w.until("the refusal", denial(ReasonCertificate))
					w.until("the end", func(r audit.Record) bool {
						return r.Kind == audit.KindEgressClose && r.Reason == string(ReasonCertificate)
					})
				}
			})
		}
	})
}

// tlsMessage is one of a handshake.
func tlsMessage(kind byte, body ...byte) []byte {
	return append([]byte{kind, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

// tlsRecord is one of TLS.
func tlsRecord(kind byte, content ...byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{kind, 3, 3}, uint16(len(content))), content...)
}

// serverHello has extensions behind its suite.
func serverHello(random []byte, extensions ...byte) []byte {
	b := append([]byte{3, 3}, make([]byte, 32)...)
	copy(b[2:], random)
	b = append(b, 0, 0xC0, 0x2F, 0)
	if len(extensions) > 0 {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(extensions))), extensions...)
	}
	return tlsMessage(helloServer, b...)
}

// chainOf is a Certificate message.
func chainOf(ders ...[]byte) []byte {
	var list []byte
	for _, d := range ders {
		list = append(append(list, byte(len(d)>>16), byte(len(d)>>8), byte(len(d))), d...)
	}
	return tlsMessage(helloCertificate, append([]byte{byte(len(list) >> 16), byte(len(list) >> 8), byte(len(list))}, list...)...)
}

var versions13 = []byte{0, extVersions, 0, 2, 3, 4}

// TestWhatHostsShow looks at what a host may say before its certificate is seen.
func TestWhatHostsShow(t *testing.T) {
	der := startSite(t, "shop.test").certs[0].Certificate[0]
	hs := func(messages ...[]byte) []byte { return tlsRecord(recordHandshake, slices.Concat(messages...)...) }
	hello, retry := serverHello(nil), serverHello(retryRandom, versions13...)
	change, alert := tlsRecord(recordChange, 1), tlsRecord(recordAlert, 1, 0)
	for _, tt := range []struct {
		name   string
		flight []byte
		shown  int  // certificates
		over   bool // there is no more to be seen
		ok     bool
	}{
		{"nothing yet", nil, 0, false, true},
		{"a certificate", slices.Concat(hs(hello), hs(chainOf(der))), 1, true, true},
		{"a certificate in the record of the hello", hs(hello, chainOf(der, der)), 2, true, true},
		{"a warning before it", slices.Concat(alert, hs(hello, chainOf(der))), 1, true, true},
		{"TLS 1.3", slices.Concat(hs(serverHello(nil, versions13...)), change, tlsRecord(23, 1, 2, 3)), 0, true, true},
		{"TLS 1.3 that asks for another hello", slices.Concat(hs(retry), change, hs(serverHello(nil, versions13...)), tlsRecord(23, 1)), 0, true, true},
		{"a second hello, and TLS 1.2", slices.Concat(hs(retry), hs(hello, chainOf(der))), 1, true, true},
		{"a session that goes on", slices.Concat(hs(hello), change, tlsRecord(recordHandshake, 9, 9, 9)), 0, true, true},
		{"one with a new ticket", slices.Concat(hs(hello, tlsMessage(helloTicket, 1, 2)), change), 0, true, true},
		{"a refusal", tlsRecord(recordAlert, 2, 40), 0, false, true},

		{"nobody's keys", hs(hello, tlsMessage(12, 1, 2, 3)), 0, false, false},
		{"the certificate before the hello", hs(chainOf(der)), 0, false, false},
		{"another message before it", hs(hello, tlsMessage(0), chainOf(der)), 0, false, false},
		{"two hellos", hs(hello, hello), 0, false, false},
		{"hellos that ask for others for ever", hs(retry, retry, retry, retry, retry), 0, false, false},
		{"no TLS", []byte("HTTP/1.1 400 Bad Request\r\n"), 0, false, false},
		{"data before a hello", tlsRecord(23, 1, 2, 3), 0, false, false},
		{"data behind the hello", slices.Concat(hs(hello), tlsRecord(23, 1, 2, 3)), 0, false, false},
		{"an alert that is something else", tlsRecord(recordAlert, make([]byte, 50)...), 0, false, false},
		{"alerts for ever", slices.Concat(alert, alert, alert, alert, alert), 0, false, false},
		{"an empty record", tlsRecord(recordHandshake), 0, false, false},
		{"an empty chain", hs(hello, chainOf()), 0, true, false},
		{"a chain longer than its message", hs(hello, tlsMessage(helloCertificate, 0, 0, 9, 0, 0, 1, 1)), 0, true, false},
		{"bytes behind the chain", hs(hello, tlsMessage(helloCertificate, append(chainOf(der)[4:], 0)...)), 0, true, false},
		{"what is no certificate", hs(hello, chainOf([]byte("no"))), 0, true, false},
		{"a message of 16 MiB", hs(hello, []byte{helloCertificate, 255, 255, 255}), 0, false, false},
		{"a hello that is cut off", hs(tlsMessage(helloServer, 3, 3)), 0, false, false},
		{"a version that there is not", hs(serverHello(nil, 0, extVersions, 0, 2, 3, 5), tlsMessage(8)), 0, false, false},
	} {
		for _, piece := range []int{len(tt.flight) + 1, 1, 7} {
			n := 0
			s := &shown{prove: func(chain []*x509.Certificate) error { n += len(chain); return nil }}
			var err error
			for b := range slices.Chunk(tt.flight, piece) {
				if err = s.hear(b); err != nil {
					break
				}
			}
			if (err == nil) != tt.ok || n != tt.shown || s.over != tt.over || err != nil && reasonOf(err) != ReasonCertificate {
				t.Errorf("%s, in pieces of %d: %d certificates, over: %v, %v", tt.name, piece, n, s.over, err)
			}
		}
	}
	if err := (*shown)(nil).hear([]byte("x")); err != nil {
		t.Error(err)
	}
}

// FuzzShown holds that it does not matter how what a host says is cut up, and that
// no certificate is held against a name twice.
func FuzzShown(f *testing.F) {
	der := startSite(f, "shop.test").certs[0].Certificate[0]
	f.Add(tlsRecord(recordHandshake, slices.Concat(serverHello(nil), chainOf(der))...), byte(3))
	f.Add(tlsRecord(recordHandshake, serverHello(retryRandom, versions13...)...), byte(0))
	f.Add(tlsRecord(recordChange, 1), byte(1))
	f.Fuzz(func(t *testing.T, b []byte, piece byte) {
		run := func(piece int) (n int, s *shown, err error) {
			s = &shown{prove: func([]*x509.Certificate) error { n++; return nil }}
			for b := range slices.Chunk(b, piece) {
				if err = s.hear(b); err != nil {
					break
				}
			}
			return n, s, err
		}
		n, s, err := run(len(b) + 1)
		m, c, cerr := run(int(piece) + 1)
		if n > 1 || m != n || (err == nil) != (cerr == nil) || s.over != c.over {
			t.Fatalf("%d and %d certificates, over %v and %v, %v and %v", n, m, s.over, c.over, err, cerr)
		}
	})
}

// TestNamesOfACertificateAreCut in what is said of it.
func TestNamesOfACertificateAreCut(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	for n := range 90 {
		tmpl.DNSNames = append(tmpl.DNSNames, fmt.Sprintf("%s%d.test", strings.Repeat("x", 40), n))
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	host, _, err := ParseAuthority("shop.test:443")
	if err != nil {
		t.Fatal(err)
	}
	_, bad := certificates(chainOf(der[:len(der)-1])[4:])
	for _, err := range []error{
		newWorld(t, nil).gw.proven(&tunnel{host: host}, []*x509.Certificate{cert}), bad,
		refuseShake(host, &tls.CertificateVerificationError{Err: cert.VerifyHostname("shop.test")}),
	} {
		if err == nil || reasonOf(err) != ReasonCertificate || len(err.Error()) > 200 {
			t.Errorf("said %v", err)
		}
	}
}
