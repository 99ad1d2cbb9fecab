package attest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/mesh"
)

const (
	idA      = "ff3c5d0a2b6f4e7d8c9b0a1f2e3d4c5b6a7988776655443322110ffeeddccbba"
	idB      = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	uid      = "2c48913c-b29f-11e7-9350-020968147796"
	uidSlice = "2c48913c_b29f_11e7_9350_020968147796"
)

func TestParseContainer(t *testing.T) {
	for _, c := range []struct{ name, path, want string }{
		{"docker, cgroup v1 or cgroupfs", "/docker/" + idA, "docker " + idA},
		{"docker, systemd", "/system.slice/docker-" + idA + ".scope", "docker " + idA},
		{"docker, with systemd inside", "/system.slice/docker-" + idA + ".scope/init.scope", "docker " + idA},
		{"podman", "/machine.slice/libpod-" + idA + ".scope", "podman " + idA},
		{"podman with crun", "/machine.slice/libpod-" + idA + ".scope/container", "podman " + idA},
		{"podman, cgroupfs", "/libpod_parent/libpod-" + idA, "podman " + idA},
		{"nerdctl", "/system.slice/nerdctl-" + idA + ".scope", "containerd " + idA},
		{"nerdctl, cgroupfs", "/default/" + idA, "containerd " + idA},
		{"pod, containerd, systemd, burstable", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidSlice + ".slice/cri-containerd-" + idA + ".scope", "k8s " + uid + " " + idA},
		{"pod, containerd, systemd, guaranteed", "/kubepods.slice/kubepods-pod" + uidSlice + ".slice/cri-containerd-" + idA + ".scope", "k8s " + uid + " " + idA},
		{"pod, CRI-O", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidSlice + ".slice/crio-" + idA + ".scope", "k8s " + uid + " " + idA},
		{"pod, CRI-O with crun", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidSlice + ".slice/crio-" + idA + ".scope/container", "k8s " + uid + " " + idA},
		{"pod, docker, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidSlice + ".slice/docker-" + idA + ".scope", "k8s " + uid + " " + idA},
		{"pod, cgroupfs, besteffort", "/kubepods/besteffort/pod" + uid + "/" + idA, "k8s " + uid + " " + idA},
		{"pod, cgroupfs, guaranteed", "/kubepods/pod" + uid + "/" + idA, "k8s " + uid + " " + idA},
		{"pod of a file", "/kubepods/burstable/pod" + idB[:32] + "/" + idA, "k8s " + idB[:32] + " " + idA},
		{"pod, inside a node of kind", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + uidSlice + ".slice/cri-containerd-" + idA + ".scope", "k8s " + uid + " " + idA},
		{"pod, inside a node of kind, cgroupfs", "/kubelet/kubepods/burstable/pod" + uid + "/" + idA, "k8s " + uid + " " + idA},

		{"no container", "/user.slice/user-1000.slice/session-2.scope", ""},
		{"the root", "/", ""},
		{"nothing", "", ""},
		{"the engine itself", "/system.slice/docker.service", ""},
		{"conmon of CRI-O", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidSlice + ".slice/crio-conmon-" + idA + ".scope", ""},
		{"conmon of podman", "/machine.slice/libpod-conmon-" + idA + ".scope", ""},
		{"the sandbox of a pod without a container", "/kubepods/besteffort/pod" + uid, ""},
		{"a container in a container", "/docker/" + idA + "/docker/" + idB, ""},
		{"a pod in a container, from outside", "/docker/" + idA + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + uidSlice + ".slice/cri-containerd-" + idB + ".scope", ""},
		{"rootless: in the hands of a user", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + idA + ".scope", ""},
		{"a user's imitation", "/user.slice/user-1000.slice/user@1000.service/docker/" + idA, ""},
		{"an imitation of a pod", "/user.slice/user-1000.slice/user@1000.service/kubepods/pod" + uid + "/" + idA, ""},
		{"an imitation in a container", "/system.slice/docker-" + idA + ".scope/kubepods/pod" + uid + "/" + idB, ""},
		{"cut off by a namespace", "/../docker/" + idA, ""},
		{"with a detour", "/docker/../docker/" + idA, ""},
		{"an empty part", "//docker/" + idA, ""},
		{"upper case", "/docker/" + strings.ToUpper(idA), ""},
		{"too short", "/docker/" + idA[:63], ""},
		{"too long", "/docker/" + idA + "0", ""},
		{"half a UID", "/kubepods/pod" + uid[:20] + "/" + idA, ""},
		{"relative", "docker/" + idA, ""},
	} {
		got := ""
		if k, ok := ParseContainer(c.path); ok {
			if got = k.Runtime + " " + k.ID; k.PodUID != "" {
				got = "k8s " + k.PodUID + " " + k.ID
			}
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestContainerSelectorsAreOnesThatEntriesMayName(t *testing.T) {
	for path, want := range map[string]string{
		"/docker/" + idA:                  "container:id:" + idA + " docker:id:" + idA,
		"/kubepods/pod" + uid + "/" + idA: "container:id:" + idA + " k8s:pod-uid:" + uid + " k8s:container-id:" + idA,
		"/":                               "",
	} {
		var got []string
		for _, s := range containerSelectors(path) {
			got = append(got, s.String())
			if p, err := mesh.ParseSelector(s.String()); err != nil || p != s {
				t.Errorf("%s: %v", s, err)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", path, got, want)
		}
	}
}

func TestSystemd(t *testing.T) {
	links := filepath.Join(t.TempDir(), "invocation:")
	for unit, id := range map[string]string{
		"payment.service": "5b7bd9b2f3f34b8c9f0e6a1d2c3b4a59", "user@1000.service": "11111111111111111111111111111111", "bad.service": "../../etc/passwd",
		`run-r1\x2d2.scope`: "22222222222222222222222222222222",
	} {
		if err := os.Symlink(id, links+unit); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ name, path, want string }{
		{"a service", "/system.slice/payment.service", "systemd:unit:payment.service systemd:invocation:5b7bd9b2f3f34b8c9f0e6a1d2c3b4a59"},
		{"with a tree of its own", "/system.slice/payment.service/workers/1", "systemd:unit:payment.service systemd:invocation:5b7bd9b2f3f34b8c9f0e6a1d2c3b4a59"},
		{"in slices", "/shop.slice/shop-pay.slice/payment.service", "systemd:unit:payment.service systemd:invocation:5b7bd9b2f3f34b8c9f0e6a1d2c3b4a59"},
		{"an escaped scope", `/system.slice/run-r1\x2d2.scope`, `systemd:unit:run-r1\x2d2.scope systemd:invocation:22222222222222222222222222222222`},
		{"a user's imitation is the user's unit", "/user.slice/user-1000.slice/user@1000.service/app.slice/payment.service", "systemd:unit:user@1000.service systemd:invocation:11111111111111111111111111111111"},
		{"an ID that is none", "/system.slice/bad.service", "systemd:unit:bad.service"},
		{"a unit that systemd does not know", "/system.slice/other.service", ""},
		{"no unit", "/docker/" + idA, ""},
		{"only slices", "/system.slice", ""},
		{"the root", "/", ""},
		{"cut off", "/../system.slice/payment.service", ""},
	} {
		sel, err := systemdSelectors(c.path, links)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		var got []string
		for _, s := range sel {
			got = append(got, s.String())
			if _, err := mesh.ParseSelector(s.String()); err != nil {
				t.Errorf("%s: %v", s, err)
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

func FuzzCgroup(f *testing.F) {
	f.Add("/docker/" + idA)
	f.Add("/kubepods.slice/kubepods-pod" + uidSlice + ".slice/cri-containerd-" + idA + ".scope")
	f.Add("/system.slice/_payment.service")
	f.Fuzz(func(t *testing.T, path string) {
		for _, s := range containerSelectors(path) {
			if err := s.Check(); err != nil {
				t.Error(err)
			}
			if strings.HasPrefix(path, "/user.slice/") {
				t.Errorf("a user's path gives %s", s)
			}
		}
		if unit, ok := unitOf(path); ok && strings.ContainsAny(unit, "/ ") {
			t.Errorf("unit %q", unit)
		}
	})
}
