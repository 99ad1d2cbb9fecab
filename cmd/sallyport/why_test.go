package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/policies"
)

// The operator asks a proxy's admin socket about the id that a caller was told.
func TestWhyAsksTheProxy(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	judge, err := authz.NewJudge(authz.JudgeConfig{Audit: audit.NewMemory(), Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	p, err := mesh.ParseFS(policies.FS, spiffeid.RequireTrustDomainFromString("demo.sallyport"))
	if err != nil {
		t.Fatal(err)
	}
	snap, err := mesh.Compile(p, 7, 7, nil)
	if err != nil {
		t.Fatal(err)
	}
	set, err := authz.Compile(snap)
	if err != nil {
		t.Fatal(err)
	}
	judge.Use(set)
	_, err = judge.Judge(&authz.Call{
		Dir: mesh.In, Src: spiffeid.RequireFromString("spiffe://demo.sallyport/ns/shop/sa/web"),
		Dst: "spiffe://demo.sallyport/ns/shop/sa/payment", Port: 8443, Verb: "GET", Path: "/v1/pay",
	})
	var denied *authz.Denial
	if !errors.As(err, &denied) {
		t.Fatal(err)
	}

	socket := filepath.Join(t.TempDir(), "run", "admin.sock")
	admin := &daemon.Admin{Socket: socket, Ready: new(daemon.Ready), Log: quiet, Extra: map[string]http.Handler{"GET /why/{id}": judge.WhyHandler()}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- admin.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	var out bytes.Buffer
	for deadline := time.Now().Add(30 * time.Second); ; {
		resp, err := daemon.AdminClient(socket).Get("http://admin/livez")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if err := run(t.Context(), []string{"why", denied.ID, "--proxy", socket}, &out, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"decision " + denied.ID, "policy revision 7", "by       no_row",
		"tried    web-pay-1 (access.csv:16), allow, does not fit: verb is GET, the row has POST",
		"  p, web-payment-1, in, spiffe://demo.sallyport/ns/shop/sa/web, spiffe://demo.sallyport/ns/shop/sa/payment, 8443, GET, /v1/pay, -, allow",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &out)
		}
	}
	if err := run(t.Context(), []string{"why", "nothing", "--proxy", socket}, &out, &out); err == nil || !strings.Contains(err.Error(), "it knows no such denial") {
		t.Errorf("an id that nobody knows: %v", err)
	}
}
