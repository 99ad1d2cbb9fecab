package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/meshtest"
)

// TestDiskFull fills the disk under the audit log of a sidecar. Calls of a
// service that fails closed are refused, those of one that fails open go on; once
// there is room again, without a restart, the log tells exactly what it does not
// have, and its sums are those of the calls.
func TestDiskFull(t *testing.T) {
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprintf("fail open %t", open), func(t *testing.T) {
			t.Parallel()
			diskFull(t, open)
		})
	}
}

func diskFull(t *testing.T, open bool) {
	meshtest.Need(t, "curl")
	meshtest.Need(t, "unshare")
	w := newWorld(t, 10*time.Minute)
	w.startIssuer()
	if open {
		w.serveBilling("fail: open")
	}
	pay, bill := &node{name: "payment"}, &node{name: "billing"}
	w.join(bill)
	w.join(pay)
	// The log is on a disk of its own, which only this sidecar sees.
	disk := w.path("billing", "disk")
	w.write("billing", strings.Replace(w.sidecarConfig(bill, w.token("billing")), "data_dir: "+w.path("billing")+"\n",
		"data_dir: "+disk+"\nrun_dir: "+w.path("billing", "run")+"\n", 1))
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	const mount = `mount -t tmpfs -o size=12m,mode=0700 tmpfs "$0" && exec "$@"`
	if out := command(t, "unshare", "--mount", "sh", "-c", mount, disk, "true"); out.Code != 0 {
		meshtest.Missing(t, "the right to mount (root)")
	}
	server := w.startWorkloadBy("billing", []string{"unshare", "--mount", "sh", "-c", mount, disk}, envListen+"="+bill.app)
	payment := w.startNode(pay)
	const charges = "http://billing.mesh.internal/v1/charges"
	w.awaitReach(payment, charges)

	seen := fmt.Sprintf("/proc/%d/root%s", server.cmd.Process.Pid, disk)
	call := func(verb string) page { return read(t, ask[runReply](payment, "/run", curl("-X", verb, charges+"/7"))) }
	got := map[string]int{}
	try := func(verb string) page {
		p := call(verb)
		got[verb+" "+p.status]++
		return p
	}
	try("DELETE")
	try("POST")
	filler := filepath.Join(seen, "filler")
	fill(t, filler)
	var unkept string // the id of a refusal
	for range 30 {
		if p := try("DELETE"); p.status == "503" {
			unkept = p.decision
		}
	}
	for range 20 {
		try("POST")
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	w.await("be answered again", func() bool { return try("DELETE").status == "403" && try("POST").status == "200" })

	log := filepath.Join(seen, "audit.jsonl")
	kept, lost, refused := 0, 0, 0
	sums := map[string]int{}
	w.await("find every call in the log", func() bool {
		kept, lost, refused = 0, 0, 0
		clear(sums)
		if err := audit.Each(log, func(_ []byte, r *audit.Record) error {
			switch {
			case r.Kind == audit.KindGap && r.Reason == "lost":
				lost += int(r.Count)
			case r.Kind == audit.KindGap && r.Reason == "refused":
				refused += int(r.Count)
			case r.Kind == audit.KindDecision && r.Verb == "DELETE":
				kept++
			case r.Kind == audit.KindRollup:
				sums[r.Verb+" "+r.Class] += int(r.Count)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return sums["POST 2xx"] == got["POST 200"] && sums["DELETE 4xx"] == got["DELETE 403"]
	})
	t.Logf("answers %v; in the log: %d refusals in full, %d lost, %d refused, sums %v", got, kept, lost, refused, sums)
	switch closed := got["DELETE 503"] + got["POST 503"]; {
	case open && (closed > 0 || lost == 0 || refused > 0 || kept+lost != got["DELETE 403"]):
		t.Errorf("a service that fails open: %d kept and %d lost of %d refusals, %d calls not answered", kept, lost, got["DELETE 403"], closed)
	case !open && (closed < 40 || lost > 0 || refused != closed || kept != got["DELETE 403"]):
		t.Errorf("a service that fails closed: %d refused and counted of %d, %d lost, %d kept of %d", refused, closed, lost, kept, got["DELETE 403"])
	}
	if !open {
		w.whyUnkept(unkept, w.path("billing", "run", "admin.sock"), id("/ns/shop/sa/payment"))
	}
	w.awaitVerified(log)
}

// serveBilling adds a line to the service billing.
func (w *world) serveBilling(line string) {
	w.t.Helper()
	file := filepath.Join(w.policy, "services.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	bill := []byte("  - name: billing\n")
	w.put(file, string(bytes.Replace(b, bill, append(bill, "    "+line+"\n"...), 1)))
}

// fill writes a file until the disk takes no more.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; {
		_, err := f.Write(make([]byte, size))
		switch {
		case errors.Is(err, syscall.ENOSPC):
			size /= 2
		case err != nil:
			t.Fatal(err)
		}
	}
}

// whyUnkept asks a proxy, and then the issuer, about the id of a refusal whose
// record could not be kept.
func (w *world) whyUnkept(id, socket, who string) {
	w.t.Helper()
	r := command(w.t, filepath.Join(bin, "sallyport"), "why", id, "--proxy", socket)
	for _, want := range []string{"decision " + id, "deny     in " + who, "by       audit", "its record could not be kept"} {
		if !strings.Contains(r.Output, want) {
			w.t.Errorf("the proxy does not say %q:\n%s", want, r.Output)
		}
	}
	w.await("hear why "+id+" from the issuer", func() bool {
		r = w.sallyport("why", id)
		return r.Code == 0
	})
	for _, want := range []string{"decision " + id, "by       audit", "records could not be written, refusals r"} {
		if !strings.Contains(r.Output, want) {
			w.t.Errorf("the issuer does not say %q:\n%s", want, r.Output)
		}
	}
}
