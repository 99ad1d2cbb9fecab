package packages

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnits holds the units to what is promised of them, also where nothing of
// systemd is installed.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob("../../deploy/systemd/*.service")
	if err != nil || len(units) != 4 {
		t.Fatalf("%v %v", units, err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		has := map[string]string{}
		for l := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(strings.TrimSpace(l), "="); ok && !strings.HasPrefix(k, "#") {
				has[k] = v
			}
		}
		want := map[string]string{
			"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": "", "SystemCallArchitectures": "native",
			"Type": "notify", "WatchdogSec": "30", "MemoryDenyWriteExecute": "yes",
		}
		if strings.Contains(u, "capture") { // the one that may do something
			want["CapabilityBoundingSet"], want["AmbientCapabilities"], want["Type"] = "CAP_NET_ADMIN", "CAP_NET_ADMIN", "oneshot"
			delete(want, "WatchdogSec")
		}
		for k, v := range want {
			if got, ok := has[k]; !ok || got != v {
				t.Errorf("%s: %s=%s, want %q", u, k, got, v)
			}
		}
		if user := has["User"]; user == "" || user == "root" {
			t.Errorf("%s runs as %q", u, user)
		}
		if _, ok := has["AmbientCapabilities"]; ok && !strings.Contains(u, "capture") {
			t.Errorf("%s has a privilege", u)
		}
	}
}
