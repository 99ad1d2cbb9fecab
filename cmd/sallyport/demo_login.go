package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// What the demo tells payment of its login.
const (
	envToken  = "DEMO_TOKEN"
	demoLogin = "https://login.test"
)

// login makes a key, lets billing believe tokens that it signs, in whose name a
// refund may be asked for, and gives payment one.
func (d *demo) login() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	b64 := base64.RawURLEncoding.EncodeToString
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return err
	}
	d.tokens = fmt.Sprintf(`issuers:
  - issuer: %s
    profile: at+jwt
    audiences: [billing]
    jwks:
      inline: '{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","use":"sig","kid":"demo","x":"%s","y":"%s"}]}'
    headers: {x-user: sub}
`, demoLogin, b64(point[1:33]), b64(point[33:]))

	now := time.Now().Unix()
	signed := b64([]byte(`{"alg":"ES256","kid":"demo","typ":"at+jwt"}`)) + "." +
		b64(fmt.Appendf(nil, `{"iss":%q,"sub":"alice","aud":"billing","client_id":"shop","jti":"demo-1","scope":"refund","iat":%d,"exp":%d}`, demoLogin, now-60, now+3600))
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return err
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	d.give("payment", envToken+"="+signed+"."+b64(sig))
	return nil
}

// refund asks for one with the token, without, and with what nobody signed.
func (a *demoApp) refund(ctx context.Context, token string) {
	forged := token[:strings.LastIndexByte(token, '.')+1] + strings.Repeat("A", 86)
	for _, c := range []struct {
		probe, token string
		want         int
	}{
		{"refund", token, http.StatusOK},
		{"refund without", "", http.StatusUnauthorized},
		{"refund forged", forged, http.StatusUnauthorized},
	} {
		var fields []string
		if c.token != "" {
			fields = []string{"Authorization", "Bearer " + c.token}
		}
		status, _, reply, err := a.do(ctx, http.MethodPost, "http://billing.mesh.internal/v1/refunds", []byte(`{"charge": 7}`), fields...)
		if ctx.Err() != nil {
			return
		}
		e := demoEvent{Probe: c.probe, Want: fmt.Sprint(c.want), Status: status, OK: err == nil && status == c.want}
		if c.want == http.StatusOK && !strings.Contains(string(reply), `"alice"`) {
			e.OK = false // billing was not told for whom
		}
		if !e.OK {
			e.Detail = fmt.Sprintf("%.200s %v", reply, err)
		}
		a.say(e)
	}
}
