package egress

import (
	"bytes"
	"crypto/tls"
	"io"
	"testing"

	"sallyport/internal/audit"
)

// demandRetry makes the origin of w answer every hello of crypto/tls with
// HelloRetryRequest, since no key share fits.
func demandRetry(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }

func TestHelloRetry(t *testing.T) {
	both(t, func(t *testing.T, dial dialFunc) {
		w := newWorld(t, nil)
		w.stripe.change.Store(&demandRetryFunc)
		tun, ref := dial(w, billing, "api.stripe.test:443")
		if ref != nil {
			t.Fatalf("refused: %+v", ref)
		}
		defer tun.Close()
		tc := tls.Client(netConn{t: tun}, &tls.Config{ServerName: "api.stripe.test", RootCAs: w.stripe.roots})
		if _, err := io.WriteString(tc, "hello"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(tc, b); err != nil || string(b) != "hello" || !tc.ConnectionState().HelloRetryRequest {
			t.Errorf("got %q, %v, retry %v", b, err, tc.ConnectionState().HelloRetryRequest)
		}
	})
}

var demandRetryFunc = demandRetry

func TestSecondHelloWithAnotherName(t *testing.T) {
	base := realHello("api.stripe.test")
	first := records(base, 16000)
	ccs := []byte{20, 3, 3, 0, 1, 1}
	noise := append([]byte{23, 3, 3, 0, 5}, "early"...)
	second := func(exts ...[]byte) []byte { return records(rebuild(base, exts...), 40) }
	tests := []struct {
		name  string
		after []byte
		want  Reason
	}{
		{"another name", second(sniBytes("evil.test")), ReasonSNI},
		{"another name behind a change of cipher", append(bytes.Clone(ccs), second(sniBytes("evil.test"))...), ReasonSNI},
		{"another name behind early data", append(bytes.Clone(noise), second(sniBytes("evil.test"))...), ReasonSNI},
		{"no name", second(), ReasonSNI},
		{"the same name, and ECH", second(sniBytes("api.stripe.test"), extensionBytes(extECH, []byte{0})), ReasonECH},
	}
	both(t, func(t *testing.T, dial dialFunc) {
		for _, early := range []bool{false, true} {
			for _, tt := range tests {
				name := tt.name
				if early {
					name += ", sent before it was asked for"
				}
				t.Run(name, func(t *testing.T) {
					w := newWorld(t, nil)
					w.stripe.change.Store(&demandRetryFunc)
					tun, ref := dial(w, billing, "api.stripe.test:443")
					if ref != nil {
						t.Fatalf("refused: %+v", ref)
					}
					defer tun.Close()
					if early {
						tun.Write(append(bytes.Clone(first), tt.after...))
					} else {
						tun.Write(first)
						if b := make([]byte, 43); true {
							if _, err := io.ReadFull(tun, b); err != nil || !bytes.Equal(b[11:], retryRandom) {
								t.Fatalf("no HelloRetryRequest: %x, %v", b, err)
							}
						}
						tun.Write(tt.after)
					}
					_, _ = io.Copy(io.Discard, tun)
					end := w.until("close", kind(audit.KindEgressClose))
					if bytes.HasPrefix(tt.after, noise) && end.Reason == "done" {
						// The origin gave up on early data before the second hello was
						// looked at; where a stream has no half close, that ends it.
						if end.BytesUp > int64(len(first)+len(noise)) {
							t.Errorf("the second hello went up: %+v", end)
						}
						return
					}
					w.until("denial", denial(tt.want))
					if end.Reason != string(tt.want) || end.BytesUp >= int64(len(first)+len(tt.after)) {
						t.Errorf("recorded %+v", end)
					}
				})
			}
		}
	})
}

// FuzzGreeting holds that, whatever the caller sends after a retry was asked
// for, no second hello gets by that check refuses, and all else is unchanged.
func FuzzGreeting(f *testing.F) {
	base := realHello("api.stripe.test")
	f.Add(records(base, 40))
	f.Add(records(rebuild(base, sniBytes("evil.test")), 16000))
	f.Add([]byte{20, 3, 3, 0, 1, 1, 22, 3, 3, 0, 2, 16, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		g := newGreeting(func(*Hello) error { return refuse(ReasonSNI, "refused") })
		g.retry = true
		close(g.decided)
		var out bytes.Buffer
		in := bytes.NewReader(raw)
		err := g.pass(&out, in)
		if !bytes.HasPrefix(raw, out.Bytes()) {
			t.Fatalf("%x became %x", raw, out.Bytes())
		}
		if err == nil && bytes.HasPrefix(raw, []byte{22, 3, 3, 0, 9, 1}) {
			t.Fatal("a ClientHello passed")
		}
	})
}
