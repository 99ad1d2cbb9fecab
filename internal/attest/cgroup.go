package attest

import (
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"sallyport/internal/mesh"
)

// unitLinks is where systemd links a unit to its invocation ID.
const unitLinks = "/run/systemd/units/invocation:"

const (
	id64 = `([0-9a-f]{64})`
	// podUID is a UUID, its dashes as underscores in the name of a slice, or the
	// hash of a static pod's file.
	podUID = `([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})`
)

// runtimes are the cgroup paths of containers, from the root of the hierarchy:
// whoever may write below a path of its own, such as a user of a delegated
// tree, must not be able to make one that looks like this. Rootless containers
// are in such a tree and have no selector.
var runtimes = []struct {
	name string
	path *regexp.Regexp
}{
	{"docker", regexp.MustCompile(`^/docker/` + id64 + `(?:/|$)`)},
	{"docker", regexp.MustCompile(`^/system\.slice/docker-` + id64 + `\.scope(?:/|$)`)},
	{"podman", regexp.MustCompile(`^/machine\.slice/libpod-` + id64 + `\.scope(?:/|$)`)},
	{"podman", regexp.MustCompile(`^/libpod_parent/libpod-` + id64 + `(?:/|$)`)},
	{"containerd", regexp.MustCompile(`^/system\.slice/nerdctl-` + id64 + `\.scope(?:/|$)`)},
	{"containerd", regexp.MustCompile(`^/default/` + id64 + `(?:/|$)`)},
}

// pods are the cgroup paths of containers in Kubernetes, by the kubelet's
// cgroupfs and systemd drivers, with and without its own root.
var pods = []*regexp.Regexp{
	regexp.MustCompile(`^(?:/kubelet)?/kubepods(?:/besteffort|/burstable|/guaranteed)?/pod` + podUID + `/(?:crio-)?` + id64 + `(?:/|$)`),
	regexp.MustCompile(`^(?:/kubelet\.slice)?/(?:kubelet-)?kubepods\.slice(?:/(?:kubelet-)?kubepods-(?:besteffort|burstable|guaranteed)\.slice)?` +
		`/(?:kubelet-)?kubepods-(?:(?:besteffort|burstable|guaranteed)-)?pod` + podUID + `\.slice/(?:cri-containerd|crio|docker)-` + id64 + `\.scope(?:/|$)`),
}

var anyID = regexp.MustCompile(id64)

// A Container is what a cgroup path tells of the container it belongs to.
type Container struct {
	// Runtime is docker, podman or containerd; empty in Kubernetes.
	Runtime string
	ID      string
	// PodUID is that of the Kubernetes pod, empty outside of one.
	PodUID string
}

// ParseContainer reads a cgroup path. It is not ok for a path of no container,
// and for one with the IDs of several: which of them the process is in depends
// on who asks.
func ParseContainer(cgroup string) (Container, bool) {
	ids := anyID.FindAllString(cgroup, -1)
	if len(ids) != 1 || !plainPath(cgroup) {
		return Container{}, false
	}
	for _, p := range pods {
		if m := p.FindStringSubmatch(cgroup); m != nil {
			return Container{ID: m[2], PodUID: strings.ReplaceAll(m[1], "_", "-")}, true
		}
	}
	for _, r := range runtimes {
		if m := r.path.FindStringSubmatch(cgroup); m != nil {
			return Container{Runtime: r.name, ID: m[1]}, true
		}
	}
	return Container{}, false
}

// plainPath refuses a path that a namespace cut off, and detours.
func plainPath(p string) bool {
	if !strings.HasPrefix(p, "/") || len(p) > 4096 {
		return false
	}
	for part := range strings.SplitSeq(p[1:], "/") {
		if part == "" || part == "." || part == ".." {
			return false
		}
	}
	return true
}

// containerSelectors are container:id, and docker:id, podman:id, containerd:id
// or k8s:pod-uid and k8s:container-id.
func containerSelectors(cgroup string) []mesh.Selector {
	c, ok := ParseContainer(cgroup)
	if !ok {
		return nil
	}
	out := []mesh.Selector{{Type: "container", Value: "id:" + c.ID}}
	if c.PodUID != "" {
		return append(out, mesh.Selector{Type: "k8s", Value: "pod-uid:" + c.PodUID}, mesh.Selector{Type: "k8s", Value: "container-id:" + c.ID})
	}
	return append(out, mesh.Selector{Type: c.Runtime, Value: "id:" + c.ID})
}

// unitOf gives the unit of the system's own systemd that a cgroup belongs to:
// the first part below the slices. What a user's systemd calls its units is
// below the unit user@UID.service and not told.
func unitOf(cgroup string) (string, bool) {
	if !plainPath(cgroup) {
		return "", false
	}
	for part := range strings.SplitSeq(cgroup[1:], "/") {
		part = strings.TrimPrefix(part, "_") // how systemd escapes names of the kernel's
		if name, slice := strings.CutSuffix(part, ".slice"); slice && name != "" {
			continue
		}
		return part, mesh.Selector{Type: "systemd", Value: "unit:" + part}.Check() == nil
	}
	return "", false
}

// systemdSelectors are systemd:unit and systemd:invocation, the ID of one start
// of the unit. links is where they are found.
func systemdSelectors(cgroup, links string) ([]mesh.Selector, error) {
	unit, ok := unitOf(cgroup)
	if !ok {
		return nil, nil
	}
	id, err := os.Readlink(links + unit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // no systemd made this cgroup
	}
	if err != nil {
		return nil, err
	}
	out := []mesh.Selector{{Type: "systemd", Value: "unit:" + unit}}
	if b, err := hex.DecodeString(id); err == nil && len(b) == 16 && strings.ToLower(id) == id {
		out = append(out, mesh.Selector{Type: "systemd", Value: "invocation:" + id})
	}
	return out, nil
}
