// kube is a whole Kubernetes cluster's worth of programs in one static binary: what they share (most of it) is compiled, linked
// and kept on disk once. The name by which it is called says which of them it is, so it is installed with a link for each;
// `kube NAME ...` does the same.
//
// Boundary: nothing of a program's behaviour is changed here; flags and configuration are Kubernetes' own.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlerrors "k8s.io/kubectl/pkg/cmd/util"

	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// programs by name. Each takes its arguments from os.Args.
var programs = map[string]func(){
	"coredns": dns,
	"etcd":    func() { etcdmain.Main(os.Args) },
	"kubeadm": func() { kubectlerrors.CheckErr(kubeadm.Run()) },
	// The messages of a failed kubectl are its own, not the command line library's.
	"kubectl":                 func() { kubectlerrors.CheckErr(cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand())) },
	"kube-apiserver":          func() { serve(apiserver.NewAPIServerCommand()) },
	"kube-controller-manager": func() { serve(controllers.NewControllerManagerCommand()) },
	"kube-proxy":              func() { serve(proxy.NewProxyCommand()) },
	"kube-scheduler":          func() { serve(scheduler.NewSchedulerCommand()) },
	"kubelet":                 func() { serve(kubelet.NewKubeletCommand(context.Background())) },
}

func serve(command *cobra.Command) { os.Exit(cli.Run(command)) }

func names() []string {
	var all []string
	for name := range programs {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

func main() {
	program, ok := programs[filepath.Base(os.Args[0])]
	if !ok && len(os.Args) > 1 {
		os.Args = os.Args[1:]
		program, ok = programs[os.Args[0]]
	}
	if !ok {
		fmt.Fprintln(os.Stderr, "usage: kube PROGRAM [ARGUMENT...], where PROGRAM is one of", strings.Join(names(), ", "))
		os.Exit(2)
	}
	program()
}
