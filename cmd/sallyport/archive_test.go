package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"time"

	auditors "filippo.io/age"
	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/archive"
	"sallyport/internal/audit"
	"sallyport/internal/scripttest"
)

// archived makes an archive of three records in as many segments: "archived DIR".
// Beside it are auditor.txt, who can read it, and stranger.txt, who cannot.
func archived(ts *testscript.TestScript, _ bool, args []string) {
	auditor, err := auditors.GenerateX25519Identity()
	ts.Check(err)
	stranger, err := auditors.GenerateX25519Identity()
	ts.Check(err)
	scripttest.Write(ts, "auditor.txt", "# of the auditor\n"+auditor.String()+"\n")
	scripttest.Write(ts, "stranger.txt", stranger.String()+"\n")
	signer, err := audit.OpenSigner(ts.MkAbs("archive.key"), "sallyport-archive-test-")
	ts.Check(err)
	scripttest.Write(ts, "known.vkey", signer.Key()+"\n")
	a, err := archive.Open(archive.Config{
		Settings: archive.Settings{Recipients: []string{auditor.Recipient().String()}, Dir: filepath.Clean(ts.MkAbs(args[0])), RotateBytes: 1},
		Name:     "test", Origin: signer.Origin(), Key: signer.Key(), Log: slog.New(slog.DiscardHandler),
		Sign: func(h archive.Head) ([]byte, error) { return signer.Sign(h.Size, h.Root) },
	})
	ts.Check(err)
	for n, method := range []string{"GET", "POST", "GET"} {
		answer := func(price int) *archive.Answer {
			return &archive.Answer{Status: 200, Message: archive.Message{Headers: []archive.Field{{"Content-Type", "application/json"}}, Body: archive.Body(fmt.Sprintf(`{"id":%d,"price":%d}`, n, price))}}
		}
		r := &archive.Record{
			Time: time.Date(2026, 11, 27, 12, 0, n, 0, time.UTC), Trace: fmt.Sprintf("%032x", n+1), Route: "bills", Name: "next", Src: "spiffe://demo.sallyport/web", Dst: "spiffe://demo.sallyport/billing",
			ShadowDst: "billing-next", Request: &archive.Request{Method: method, Host: "billing.mesh.internal", Path: fmt.Sprintf("/v1/bills/%d", 100+n), Query: "full=1",
				Message: archive.Message{Headers: []archive.Field{{"Authorization", "Bearer hidden"}, {"X-Plain", "yes"}}}},
			Primary: answer(10), Shadow: answer(10 + n/2), PrimaryMicros: 1000, ShadowMicros: 2000,
		}
		a.Add(r)
	}
	ts.Check(a.Close())
}

// answers starts a server that answers as the primary of archived did, and puts
// its URL into a variable: "answers NAME".
func answers(ts *testscript.TestScript, _ bool, args []string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var n int
		_, err := fmt.Sscanf(r.URL.Path, "/v1/bills/%d", &n)
		if err != nil || r.Header.Get("Sallyport-Shadow") != "1" || r.Header.Get("X-Plain") != "yes" || r.Header.Get("Authorization") != "" || r.Host != "billing.mesh.internal" || r.URL.RawQuery != "full=1" {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, fmt.Sprintf(`{"price":10, "id":%d}`, n-100))
	}))
	ts.Defer(s.Close)
	ts.Setenv(args[0], s.URL)
}
