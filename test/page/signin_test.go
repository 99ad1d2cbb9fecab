package page

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"sallyport/internal/page"
	"sallyport/internal/page/pagetest"
)

// provider lets everybody in as an operator, without asking.
func provider(t *testing.T) *httptest.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	sign := func(claims map[string]any) string {
		body, _ := json.Marshal(claims)
		text := b64([]byte(`{"alg":"ES256","kid":"k"}`)) + "." + b64(body)
		sum := sha256.Sum256([]byte(text))
		r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
		if err != nil {
			t.Error(err)
			return ""
		}
		sig := make([]byte, 64)
		r.FillBytes(sig[:32])
		s.FillBytes(sig[32:])
		return text + "." + b64(sig)
	}
	nonces := make(chan string, 1)
	mux := http.NewServeMux()
	srv := httptest.NewUnstartedServer(mux)
	at := "https://" + srv.Listener.Addr().String()
	answer := func(pattern string, v func() any) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v()) })
	}
	answer("GET /.well-known/openid-configuration", func() any {
		return map[string]string{"issuer": at, "authorization_endpoint": at + "/auth", "token_endpoint": at + "/token", "jwks_uri": at + "/keys"}
	})
	answer("GET /keys", func() any {
		return map[string]any{"keys": []any{map[string]string{"kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256", "x": b64(raw[1:33]), "y": b64(raw[33:])}}}
	})
	answer("POST /token", func() any {
		now := time.Now().Unix()
		return map[string]string{"id_token": sign(map[string]any{"iss": at, "aud": "page", "sub": "alice", "groups": "ops", "nonce": <-nonces, "iat": now, "exp": now + 60})}
	})
	mux.HandleFunc("GET /auth", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		nonces <- q.Get("nonce")
		http.Redirect(w, r, q.Get("redirect_uri")+"?"+url.Values{"code": {"c"}, "state": {q.Get("state")}}.Encode(), http.StatusFound)
	})
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv
}

// TestSignIn comes to the page as a stranger, and enters by a provider.
func TestSignIn(t *testing.T) {
	tell(t)
	b := &tab{t: t, mesh: pagetest.New(40, time.Now())}
	login := provider(t)
	srv := httptest.NewUnstartedServer(nil)
	b.url = "https://" + srv.Listener.Addr().String()
	conf := b.mesh.Config()
	conf.Now = time.Now
	conf.OIDC = &page.OIDC{
		Issuer: login.URL, Client: "page", URL: b.url, Operators: []string{"ops"},
		CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: login.Certificate().Raw})),
	}
	var err error
	if b.page, err = page.New(conf); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = b.page.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	srv.Config.Handler = b.page.Handler()
	srv.StartTLS()
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	b.start()
	b.do(chromedp.Navigate(b.url + "/rollouts"))
	b.is(`document.querySelector("#signin") !== null`)
	b.text(axe + `;""`)
	b.look("sign in")
	b.do(chromedp.Click(chromedp.CSS("#signin")))
	b.shown("/denied")
	b.is(`document.querySelector("#domain").innerText.includes("/oidc/operator/alice")`)
	b.is(`document.querySelector("#pulse").dataset.is === "live"`)
	b.visit("/rollouts")
	b.is(`document.querySelector("#promote-shop-cart-default") !== null`)
	if at := b.text("location.href"); at != b.url+"/rollouts" {
		t.Errorf("the address is %q", at)
	}
}
